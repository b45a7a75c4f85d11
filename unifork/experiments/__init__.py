"""From `experiments/NAME.yaml` to `params.yaml`: derived entries and checks.

What DVC needs and follows from the rest (every stage of every variant with every seed, every evaluation) is derived
here and written into `params.yaml`, so that `dvc.yaml` can loop over it. What an experiment takes from another one,
and a variant or stage from another of its kind, is written out by `inheritance`.
"""

import os
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from flatten_dict import flatten

from unifork.config import (
    AnalyzedRun,
    Benchmark,
    Card,
    EvalCard,
    Experiment,
    PreparedSet,
    StageRun,
    Variant,
    fingerprint,
    load_card,
    load_eval,
    load_text,
    parse,
    read_yaml,
)
from unifork.documents.prompts import template_named
from unifork.errors import ConfigError, one_of, refusing
from unifork.evaluation.suites import suite_of
from unifork.experiments import checks, inheritance
from unifork.experiments.followed import followed
from unifork.experiments.tracking import write_ignore_rules
from unifork.layout import Layout
from unifork.vocabulary import VIEW_OF_TASK

HERE = Layout()
WRITTEN = "# Hash of all that follows, by which an edit is noticed: "
SHOWN_KEYS = 10


def names(folder: Path = HERE.experiments) -> dict[str, str]:
    """Every experiment, with the first line of its file, which says what it is."""
    texts = {path.stem: path.read_text() for path in folder.glob("*.yaml")}
    return {name: text.partition("\n")[0].lstrip("# ") for name, text in sorted(texts.items())}


class Choice(NamedTuple):
    """What the command line says of an experiment instead of its file."""

    seeds: tuple[int, ...] = ()
    """Training seeds; none: as the file says."""
    plain: bool = False
    """Whether the only seed stands in no name, as with `training_seed`."""
    variants: tuple[str, ...] = ()
    """Those that are kept; none: all."""


AS_WRITTEN = Choice()


def resolve(
    name: str, folder: Path = HERE.experiments, cards: Path = HERE.cards, choice: Choice = AS_WRITTEN
) -> Experiment:
    """The complete experiment of that name, checked but for what takes torch.

    Raises ConfigError naming file, key and value.
    """
    experiment, loaded = _read(name, folder, cards, choice)
    checks.check_choices(experiment, loaded, str(folder / f"{name}.yaml"))
    return experiment


def params_text(experiment: Experiment) -> str:
    """The text of `params.yaml`."""
    body = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    head = f"# Written by `unifork use {experiment.name}`; what to edit is experiments/{experiment.name}.yaml.\n"
    return f"{head}{WRITTEN}{fingerprint(body)}\n{body}"


def use(name: str, force: bool = False, choice: Choice = AS_WRITTEN) -> Experiment:
    """Check an experiment and write `params.yaml`. Raises ConfigError when that would overwrite edits made by hand."""
    experiment, place = resolve(name, choice=choice), str(HERE.experiments / f"{name}.yaml")
    checks.check_cluster(experiment, place)
    if HERE.params.exists() and not force:
        edits = _edits(experiment)
        if edits:
            more = f" and {len(edits) - SHOWN_KEYS} more" if len(edits) > SHOWN_KEYS else ""
            raise ConfigError(
                f"{HERE.params} was edited: {'; '.join(edits[:SHOWN_KEYS])}{more}. Put the changes into a file of "
                f"experiments/ (it may say `extends: {name}`), or overwrite them with --force"
            )
    checks.check_models(experiment, place)
    HERE.params.write_text(params_text(experiment))
    write_ignore_rules(experiment, HERE.dvc_ignore)
    for folder in (HERE.data, HERE.answers(""), HERE.scores("")):  # the report reads them; not all are made by a stage
        folder.mkdir(parents=True, exist_ok=True)
    return experiment


def _edits(experiment: Experiment) -> list[str]:
    """`key: written -> found` of every value of `params.yaml` that was not written by `use`."""
    mark, _, body = HERE.params.read_text().partition(WRITTEN)[2].partition("\n")
    if mark == fingerprint(body):
        return []
    found = read_yaml(HERE.params) or {}
    other = found.get("name") if isinstance(found, dict) else None
    if other in names() and other != experiment.name:
        experiment, _ = _read(other, HERE.experiments, HERE.cards)
    leaves = partial(flatten, reducer="dot", enumerate_types=(list,), keep_empty_types=(dict, list))
    before, now = leaves(experiment.model_dump(mode="json")), leaves(found if isinstance(found, dict) else {})
    return [
        f"{key}: {before.get(key, 'nothing')} -> {now.get(key, 'nothing')}"
        for key in {**before, **now}
        if key not in before or key not in now or before[key] != now[key]
    ]


def _read(name: str, folder: Path, cards: Path, choice: Choice = AS_WRITTEN) -> tuple[Experiment, dict[str, Card]]:
    """The experiment with all that is derived, and its cards; every name it uses is known."""
    path = folder / f"{name}.yaml"
    plain = {"name": name, **inheritance.inherited(name, folder)}
    checks.check_seeds(plain, str(path))
    if choice.seeds:
        plain |= {"training_seed": choice.seeds[0], "seeds": ()} if choice.plain else {"seeds": choice.seeds}
    roots: dict[str, str] = {}
    if isinstance(variants := plain.get("variants"), dict):
        plain["variants"], roots = inheritance.alike(variants, str(path))
    if isinstance(stages := plain.get("stages"), dict):
        plain["stages"] = inheritance.extended(stages, str(path))
    filled = ("prepared", "runs", "evaluations", "text_runs", "scored", "analyzed", "examined")
    derived: dict[str, Any] = {key: {} for key in filled}
    experiment = parse(Experiment, plain | derived, str(path))
    loaded = {dataset: load_card(dataset, cards) for dataset in experiment.datasets}
    evals = {name: _eval(name, use, str(path)) for name, use in experiment.benchmarks.items()}
    checks.check_names(experiment, loaded, str(path))
    checks.check_alike(experiment, roots, str(path))
    for variant in choice.variants:
        one_of("variant", variant, experiment.variants, "--variants")
    shared = {"prepared": _prepared(experiment)}  # by all variants, kept or not: what is there stays as it is
    kept = experiment.model_copy(update=shared | {"variants": _with_seeds(experiment, choice.variants)})
    return kept.model_copy(update=_derived(kept, loaded, evals)), loaded


def _with_seeds(experiment: Experiment, kept: Collection[str]) -> dict[str, Variant]:
    """The variants that are kept, with each training seed; a list of seeds, even of a single one, stands in names."""
    seeds = {f"-seed{seed}": seed for seed in experiment.seeds} or {"": experiment.training_seed}
    return {
        f"{name}{suffix}": variant.model_copy(update={"seed": seed})
        for name, variant in experiment.variants.items()
        if not kept or name in kept
        for suffix, seed in seeds.items()
    }


def _prepared(experiment: Experiment) -> dict[str, PreparedSet]:
    """Every text column of a data set that some stage of some variant reads with some template."""
    prepared: dict[str, PreparedSet] = {}
    for stage in dict.fromkeys(stage for variant in experiment.variants.values() for stage in variant.stages):
        for entry in experiment.stages[stage].entries:
            chosen = PreparedSet(
                dataset=entry.dataset, text=entry.text, template=entry.template,
                codes=f"data/codes/{entry.dataset}/{VIEW_OF_TASK[entry.task]}",
            )  # fmt: skip
            if prepared.setdefault(entry.prepared, chosen) != chosen:
                raise ConfigError(f"stages.{stage}: two sets of prepared documents are called {entry.prepared!r}")
    return prepared


def _eval(name: str, use: Benchmark, place: str) -> EvalCard:
    """The card of a benchmark as it is used; its suite, options, rules and template are known."""
    with refusing(ConfigError, f"{place}: benchmarks.{name}", ConfigError):
        card = load_eval(name, HERE.evals).used(use)
        suite_of(card)
        template_named(card.answer.template, f"card {name}: answer.template")
    return card


def _derived(experiment: Experiment, cards: dict[str, Card], evals: dict[str, EvalCard]) -> dict[str, Any]:
    datasets = {
        name: use.model_copy(update={"follows": followed(cards[name], f"datasets/{name}.yaml")})
        for name, use in experiment.datasets.items()
    }
    runs: dict[str, StageRun] = {}
    analyzed: dict[str, AnalyzedRun] = {}
    for name, variant in experiment.variants.items():
        before = f"models/{name}-init"
        for stage in variant.stages:
            if extended := experiment.stages[stage].extend:
                before = f"models/{name}-{extended}"
            entries = experiment.stages[stage].entries
            codes = _deepest("data/codes", (entry.dataset for entry in entries))
            documents = _deepest("data/prepared", (entry.prepared for entry in entries))
            runs[f"{name}-{stage}"] = StageRun(variant=name, stage=stage, after=before, codes=codes, prepared=documents)
            before = f"models/{name}-{stage}"
            if kinds := experiment.analyses.of_stage(stage):
                items = f"data/evals/{prompts}" if (prompts := experiment.analyses.prompts) else _if_there(None)
                analyzed[f"{name}-{stage}"] = AnalyzedRun(kinds=kinds, start=f"models/{name}-init", prompts=items)
    pairs = {
        f"{name}-{benchmark}": {"variant": name, "benchmark": benchmark, "model": f"models/{name}-{variant.stages[-1]}"}
        for name, variant in experiment.variants.items()
        for benchmark in experiment.all_benchmarks
    }
    texts = {name: load_text(name, HERE.evals) for name in experiment.text_evals}
    follows = {name: None if card.absent else card.include_path for name, card in texts.items()}
    benchmarks = {
        name: use.model_copy(update={"follows": _if_there(evals[name].items.archive)})
        for name, use in experiment.benchmarks.items()
    }
    return {
        "datasets": datasets, "runs": runs, "benchmarks": benchmarks, "analyzed": analyzed,
        "evaluations": {key: pair for key, pair in pairs.items() if pair["benchmark"] in evals},
        "text_runs": {
            key: {**pair, "follows": _if_there(follows[pair["benchmark"]])}
            for key, pair in pairs.items() if pair["benchmark"] in texts
        },
        "scored": {name: every for name in experiment.variants if (every := experiment.all_benchmarks)},
        "examined": _examined(experiment.variants, evals, benchmarks),
    }  # fmt: skip


def _if_there(folder: str | None) -> str:
    """A folder that DVC follows, where it is there; a page of text where not."""
    return folder if folder and Path(folder).is_dir() else (HERE.evals / "README.md").as_posix()


def _examined(
    variants: Iterable[str], evals: dict[str, EvalCard], benchmarks: dict[str, Benchmark]
) -> dict[str, dict[str, str]]:
    """Where networks look at images: names, images, results, and the folder of the networks, if it is there."""
    found = {}
    for name, card in evals.items():
        suite, _ = suite_of(card)
        networks = _if_there(os.path.commonpath(n.path for n in card.networks.values()) if card.networks else None)
        pairs = [(f"{variant}/{name}", f"answers/{variant}/{name}") for variant in variants if suite.examine]
        entries = {f"{pair.replace('/', '-')}": (pair, images, f"{images}.found") for pair, images in pairs}
        if suite.summarize:
            entries[f"{name}-reference"] = (name, str(benchmarks[name].follows), f"data/evals/{name}-reference")
        for key, (pair, images, out) in entries.items():
            found[key] = {"name": pair, "benchmark": name, "images": images, "out": out, "networks": networks}
    return found


def _deepest(folder: str, names: Iterable[str]) -> str:
    """The folder, or the only one in it that is named."""
    found = set(names)
    return f"{folder}/{found.pop()}" if len(found) == 1 else folder
