"""From `experiments/NAME.yaml` to `params.yaml`: inheritance, derived entries, cross-checks.

An experiment may say `extends: OTHER` and then only what differs; `null` takes an entry out, and a
tokenizer that is imported replaces the inherited one whole. What
DVC needs and follows from the rest (every stage of every variant, every evaluation) is derived here
and written into `params.yaml`, so that `dvc.yaml` can loop over it.
"""

from pathlib import Path
from typing import Any

import yaml

from unifork.config import Card, Experiment, ImageTokenizerConfig, TextTokenizerConfig, load_card, parse, read_yaml
from unifork.errors import ConfigError, unknown
from unifork.experiments.followed import followed

FOLDER = Path("experiments")
PARAMS = Path("params.yaml")
IMPORT = "import"


def resolve(name: str, folder: Path = FOLDER, cards: Path = Path("datasets")) -> Experiment:
    """The complete experiment of that name. Raises ConfigError naming file, key and value."""
    path = folder / f"{name}.yaml"
    plain = {"name": name, **_inherited(name, folder, ())}
    known = parse(Experiment, {**plain, "runs": {}, "evaluations": {}}, str(path))
    loaded = {dataset: load_card(dataset, cards) for dataset in known.datasets}
    _check(known, loaded, str(path))
    return known.model_copy(update=_derived(parse(Experiment, plain, str(path)), loaded))


def params_text(experiment: Experiment) -> str:
    """The text of `params.yaml`."""
    plain = experiment.model_dump(mode="json")
    head = f"# Written by `unifork use {experiment.name}` from experiments/{experiment.name}.yaml.\n"
    return head + str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110))


def use(name: str, force: bool = False) -> Experiment:
    """Write `params.yaml`. Raises ConfigError when that would overwrite edits made by hand."""
    experiment = resolve(name)
    if PARAMS.exists() and not force:
        current = PARAMS.read_text()
        other = (read_yaml(PARAMS) or {}).get("name")
        written = params_text(resolve(other)) if other and (FOLDER / f"{other}.yaml").exists() else None
        if current not in (written, params_text(experiment)):
            raise ConfigError(
                f"{PARAMS} differs from experiments/{other}.yaml; put the changes into a file of experiments/ "
                f"(with `extends: {other}`), or overwrite them with --force"
            )
    PARAMS.write_text(params_text(experiment))
    return experiment


def _inherited(name: str, folder: Path, heirs: tuple[str, ...]) -> dict[str, Any]:
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise unknown("experiment", name, (p.stem for p in folder.glob("*.yaml")), str(folder))
    if name in heirs:
        raise ConfigError(f"{path}: extends itself by way of {' -> '.join((*heirs, name))}")
    plain = dict(read_yaml(path))
    parent = plain.pop("extends", None)
    return _merged(_inherited(parent, folder, (*heirs, name)), plain) if parent else plain


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict) and IMPORT not in value:
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


def _derived(experiment: Experiment, cards: dict[str, Card]) -> dict[str, Any]:
    datasets = {
        name: use.model_copy(update={"follows": followed(cards[name], f"datasets/{name}.yaml")})
        for name, use in experiment.datasets.items()
    }
    runs: dict[str, Any] = {}
    for name, variant in experiment.variants.items():
        before = f"models/{name}-init"
        for stage in variant.stages:
            sets = {e.dataset for track in experiment.stages[stage].tracks.values() for e in track.mixture}
            codes = f"data/codes/{sets.pop()}" if len(sets) == 1 else "data/codes"
            runs[f"{name}-{stage}"] = {"variant": name, "stage": stage, "after": before, "codes": codes}
            before = f"models/{name}-{stage}"
    evaluations = {
        f"{name}-{benchmark}": {"variant": name, "benchmark": benchmark, "model": f"models/{name}-{variant.stages[-1]}"}
        for name, variant in experiment.variants.items()
        for benchmark in experiment.benchmarks
    }
    again = parse(
        Experiment, {**experiment.model_dump(mode="json"), "runs": runs, "evaluations": evaluations}, "derived"
    )
    return {"datasets": datasets, "runs": again.runs, "evaluations": again.evaluations}


def _check(experiment: Experiment, cards: dict[str, Card], place: str) -> None:
    pictures, texts = experiment.image_tokenizer, experiment.text_tokenizer
    readers = {
        "image_tokenizer.training": pictures.training.datasets if isinstance(pictures, ImageTokenizerConfig) else (),
        "text_tokenizer": texts.datasets if isinstance(texts, TextTokenizerConfig) else (),
    }
    for part, datasets in readers.items():
        for dataset in datasets:
            if dataset not in experiment.datasets:
                raise unknown("data set", dataset, experiment.datasets, f"{place}: {part}.datasets")
    for name, variant in experiment.variants.items():
        for stage_name in variant.stages:
            if stage_name not in experiment.stages:
                raise unknown("stage", stage_name, experiment.stages, f"{place}: variants.{name}.stages")
    for stage_name, stage in experiment.stages.items():
        for track_name, track in stage.tracks.items():
            for entry in track.mixture:
                where = f"{place}: stages.{stage_name}.tracks.{track_name}.mixture"
                if entry.dataset not in experiment.datasets:
                    raise unknown("data set", entry.dataset, experiment.datasets, where)
                use = cards[entry.dataset].tasks.get(entry.task)
                if use is None:
                    raise unknown(f"task of {entry.dataset}", entry.task, cards[entry.dataset].tasks, where)
                if entry.text not in use.texts:
                    raise unknown(f"text of {entry.dataset} for {entry.task}", entry.text, use.texts, where)
