"""From what finished runs left on disk to the small files of a study.

In: an experiment and its folders. Out: a `Record` for each run of which everything is there, what all runs share, and
an image of what variants draw for the same prompts. Nothing is computed anew and nothing is generated.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import unifork
from unifork.analysis.results import Alignment, Conflicts
from unifork.config import EvalCard, Experiment, Variant, fingerprint, parse
from unifork.errors import ConfigError, DataError
from unifork.evaluation.answering import draws
from unifork.evaluation.items import Item, read_items
from unifork.evaluation.scoring import METRICS
from unifork.figures import LOOK
from unifork.images import open_image
from unifork.layout import Layout
from unifork.models.layer_plan import LayerPlan
from unifork.report.band import card_of, first_scores
from unifork.report.reading import Content, last_validation, read_json
from unifork.report.study import (
    STUDY,
    GridPrompt,
    Record,
    Results,
    Study,
    StudyVariant,
    read_study,
    results_of,
)
from unifork.report.surroundings import machine, surroundings
from unifork.report.tables import words
from unifork.report.training import parts_of
from unifork.shards.job import read_table
from unifork.shards.manifest import MANIFEST, read_manifest, write_atomically, write_json
from unifork.training.checkpoint import FINISHED, Finished
from unifork.training.export import SUMMARY, TRAINING, Summary

OUTSIDE_RUNS = ("REPORT_VERSION", "PUBLISH_VERSION")
"""Versions from which no number of a run follows."""
NOT_IN_NUMBERS = dict.fromkeys(
    ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "sample_prompts", "loss_band"), True
)
"""Fields of a stage that decide no number of a record: a run either ends or has none."""
VERSION = re.compile(r"^([A-Z_]+_VERSION) = (\d+)$", re.MULTILINE)
FIGURE_INCHES, TITLE_WIDTH = 0.95, 17
"""Of an image of the grid; letters of a line above it."""


def config_hash(experiment: Experiment, name: str) -> str:
    """Hash of all in `params.yaml` that decides the numbers of a variant, but for its seed."""
    variant = experiment.variants[name]
    shared = experiment.model_dump(
        mode="json",
        include={"data_seed", "datasets", "image_tokenizer", "text_tokenizer", "benchmarks", "text_evals", "analyses"},
        exclude={"datasets": {"__all__": {"follows", "track"}}, "benchmarks": {"__all__": {"follows"}}},
    )
    shared["analyses"] = {key: value for key, value in shared["analyses"].items() if value is not None}
    stages = [experiment.stages[stage].model_dump(mode="json", exclude=NOT_IN_NUMBERS) for stage in variant.stages]
    return fingerprint([variant.model_dump(mode="json", exclude={"seed"}), stages, shared])


def versions() -> dict[str, int]:
    """The version constants of this code, read without running it."""
    files = sorted(Path(unifork.__file__).parent.rglob("*.py"))
    found = dict(pair for file in files for pair in VERSION.findall(file.read_text()))
    return {name: int(number) for name, number in sorted(found.items()) if name not in OUTSIDE_RUNS}


def missing(experiment: Experiment, name: str, layout: Layout) -> list[Path]:
    """The files of a variant that are not there yet, without which there is no record of it."""
    runs = [f"{name}-{stage}" for stage in experiment.variants[name].stages]
    wanted = [layout.model(run) / TRAINING / SUMMARY for run in runs]
    wanted += [layout.scores(name) / benchmark / METRICS for benchmark in experiment.all_benchmarks]
    kinds = {run: experiment.analyzed[run].kinds for run in runs if run in experiment.analyzed}
    wanted += [layout.analysis(run) / f"{kind}.json" for run, names in kinds.items() for kind in names]
    return [path for path in wanted if not path.exists()]


def record_of(experiment: Experiment, group: str, name: str, layout: Layout, here: Mapping[str, Any]) -> Record:
    """A finished variant. group: its name without the seed. here: `surroundings`."""
    variant = experiment.variants[name]
    runs = {stage: f"{name}-{stage}" for stage in variant.stages}
    finished = {stage: read_json(layout.run(run) / FINISHED, Finished) for stage, run in runs.items()}
    summary = read_json(layout.model(runs[variant.stages[-1]]) / TRAINING / SUMMARY, Summary)
    scores = first_scores(experiment, name, layout)
    alignment = _analyses(runs, layout, "alignment", Alignment)
    conflict = _analyses(runs, layout, "conflict", Conflicts)
    plain = {
        "variant": group, "seed": variant.seed, "plan": plan_of(variant)[0],
        "parameters": sum(map(sum, parts_of(summary["tensors"] if summary else {}).values())),
        "config_hash": config_hash(experiment, name), "versions": versions(),
        "commit": here["revision"], "machine": machine(here),
        "items": {key.split(" ")[0]: score.items_hash for key, score in scores.items()},
        "seconds": {stage: end["seconds"] for stage, end in finished.items() if end},
        "scores": {
            key: {"value": score.value, "error": score.standard_error, "chance": score.chance}
            for key, score in scores.items()
        },
        "losses": {name: loss for stage, run in runs.items() for name, loss in _losses(stage, layout.model(run))},
        "alignment": {stage: found["curves"] for stage, found in alignment.items()},
        "conflict": {stage: _matrices(found) for stage, found in conflict.items()},
    }  # fmt: skip
    return parse(Record, plain, name)


def plan_of(variant: Variant) -> tuple[str, int | None]:
    """A variant's plan, layer by layer where the number of layers is written, and its first layer split by task."""
    with suppress(ConfigError):
        plan = LayerPlan.parse(variant.plan, variant.backbone.get("num_hidden_layers"))
        return str(plan), next((n for n, kind in enumerate(plan.kinds) if kind.route == "task"), None)
    return variant.plan, None


def _losses(stage: str, model: Path) -> Iterator[tuple[str, float]]:
    """Losses of held-out rows at the end of a stage, with their names."""
    for row in last_validation(model / TRAINING / "validation.csv"):
        for column in row:
            if "_loss" in column:
                yield f"{stage} {row['part']} {words(column.replace('_loss', ''))}", row[column]


def _analyses(runs: Mapping[str, str], layout: Layout, kind: str, form: type[Content]) -> dict[str, Content]:
    """What an analysis found after each stage that has it."""
    found = {stage: read_json(layout.analysis(run) / f"{kind}.json", form) for stage, run in runs.items()}
    return {stage: content for stage, content in found.items() if content}


def _matrices(found: Conflicts) -> dict[str, dict[int, float]]:
    """Conflict by matrix and layer, of names such as `layers.3.mlp.shared.down_proj.weight`."""
    matrices: dict[str, dict[int, float]] = {}
    for name, row in found["matrices"].items():
        _, layer, *_, matrix, _ = name.split(".")
        matrices.setdefault(matrix, {})[int(layer)] = row["conflict"]
    return matrices


def study_of(experiment: Experiment, layout: Layout) -> Study:
    """What the runs of an experiment share."""
    firsts = {group: experiment.variants[min(seeds.items())[1]] for group, seeds in experiment.groups.items()}
    plans = {group: plan_of(variant) for group, variant in firsts.items()}
    cards = {name: card_of(name, experiment, layout) for name in experiment.benchmarks}
    drawn = [name for name, card in cards.items() if isinstance(card, EvalCard) and draws(card.answer)]
    benchmark = next((name for name in drawn if (layout.items(name) / MANIFEST).exists()), None)
    return Study(
        name=experiment.name, data_seed=experiment.data_seed, benchmark=benchmark,
        variants=tuple(StudyVariant(name=group, plan=plan, fork=fork) for group, (plan, fork) in plans.items()),
        prompts=grid_prompts(read_items(layout.items(benchmark))) if benchmark else (),
    )  # fmt: skip


def grid_prompts(items: Sequence[Item]) -> tuple[GridPrompt, ...]:
    """The first item of each kind and split, none of whose text stands there already."""
    found: dict[str, GridPrompt] = {}
    for item in items:
        about = words(f"{item.about.get('kind', '')} ({item.split})".strip())
        if all(item.question != prompt.text for prompt in found.values()):
            found.setdefault(about, GridPrompt(id=item.id, text=item.question, about=about))
    return tuple(found.values())


def found_here(experiment: Experiment, layout: Layout, here: Mapping[str, Any]) -> Results:
    """The study as far as its runs lie in the folders of the experiment, without hypotheses."""
    names = {name: group for group, seeds in experiment.groups.items() for name in seeds.values()}
    whole = [name for name in names if not missing(experiment, name, layout)]
    records = [record_of(experiment, names[name], name, layout, here) for name in whole]
    return results_of(study_of(experiment, layout), records, experiment.name)


def record(experiment: Experiment, layout: Layout, folder: Path, again: bool = False) -> dict[str, str]:
    """Write a file for each finished run, and `study.json`; by name of the run what was done.

    A file of the same configuration and versions stays as it is. What other calls have recorded stays, too, so that
    variants and seeds may be recorded apart. Raises ConfigError where the folder is of a study with other data.
    """
    study = study_of(experiment, layout)
    if (folder / STUDY).exists():
        before = read_study(folder)
        if before.data_seed != study.data_seed:
            pair = f"{before.data_seed}, in params.yaml {study.data_seed}"
            raise ConfigError(f"{folder / STUDY}: data_seed: {pair}; another study needs another folder")
        old, new = ({variant.name: variant for variant in each.variants} for each in (before, study))
        variants = tuple((new if old.keys() <= new.keys() else old | new).values())
        study = (study if study.benchmark else before).model_copy(update={"variants": variants})
    here, now, done = surroundings(layout.root), versions(), dict[str, str]()
    for group, seeds in experiment.groups.items():
        for seed, name in seeds.items():
            path = folder / f"{group}-seed{seed}.json"
            mark = {"config_hash": config_hash(experiment, name), "versions": now}
            if path.exists() and not again and mark.items() <= (read_json(path, dict[str, Any]) or {}).items():
                done[name] = "recorded before"
            elif gone := missing(experiment, name, layout):
                done[name] = f"missing: {gone[0]}" + f" and {len(gone) - 1} more" * (len(gone) > 1)
            else:
                write_json(path, record_of(experiment, group, name, layout, here).model_dump(mode="json"))
                done[name] = "recorded"
    write_json(folder / STUDY, study.model_dump(mode="json"))
    return done


def grid(study: Study, layout: Layout, seed: int, out: Path) -> int:
    """An image with a row for each variant and a column for each prompt, from the answers of one training seed.

    Returns how many variants are in it; raises DataError where there are none or no prompts.
    """
    if study.benchmark is None:
        raise DataError(f"{study.name}: {STUDY} has no prompts; record it where the items of a benchmark lie")
    rows = {}
    for variant in study.variants:
        names = (f"{variant.name}-seed{seed}", variant.name)
        folders = [layout.answers(name) / study.benchmark for name in names]
        if there := [folder for folder in folders if (folder / MANIFEST).exists()]:
            rows[variant.name] = _drawn(there[0], {prompt.id for prompt in study.prompts})
    if not rows:
        raise DataError(f"{layout.answers('')}: no images of {study.benchmark} with seed {seed}")
    with matplotlib.rc_context(fname=LOOK):
        size = (1.1 + FIGURE_INCHES * len(study.prompts), 0.75 + FIGURE_INCHES * len(rows))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        axes_RC = figure.subplots(len(rows), len(study.prompts), squeeze=False)
        for axes_C, (name, images) in zip(axes_RC, rows.items(), strict=True):
            axes_C[0].set_ylabel(name, rotation=0, ha="right", va="center")
            for axes, prompt in zip(axes_C, study.prompts, strict=True):
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                axes.spines[:].set_visible(False)
                if prompt.id in images:
                    axes.imshow(images[prompt.id], interpolation="nearest")
        for axes, prompt in zip(axes_RC[0], study.prompts, strict=True):
            axes.set_title(f"{fill(prompt.text, TITLE_WIDTH)}\n{prompt.about}", fontsize=5.5)
        write_atomically(out, lambda path: figure.savefig(path, format="png", dpi=160, metadata={"Software": None}))
    return len(rows)


def _drawn(folder: Path, ids: set[str]) -> dict[str, np.ndarray]:
    """Images of a folder of answers by id."""
    shards = (read_table(folder, shard).select(["id", "image"]).to_pylist() for shard in read_manifest(folder).shards)
    return {row["id"]: np.asarray(open_image(row["image"])) for rows in shards for row in rows if row["id"] in ids}
