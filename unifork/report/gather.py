"""Everything an experiment left on disk, as plain facts.

In: the experiment and its folders. Out: `Facts`, in the order of the page. A stage that has not run leaves
None or an empty list; a damaged file raises DataError. Pictures are made elsewhere (`pictures`), words in the template.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from unifork.config import Card, Experiment, Stage, Variant, load_card
from unifork.evaluation.benchmarks import BENCHMARKS, Program
from unifork.evaluation.statistics import Score
from unifork.layout import MODEL_IMAGE_TOKENIZER, Layout
from unifork.models.warm_start import branch_of
from unifork.report.reading import (
    Answered,
    Drawn,
    Finished,
    Measures,
    Step,
    Summary,
    read_codes,
    read_history,
    read_json,
    read_samples,
    read_scores,
)
from unifork.shards.manifest import MANIFEST, Manifest, read_manifest
from unifork.vocabulary import VIEWS, View

PARTS = ("embeddings", "connector", "shared trunk", "image head", "text head", "codebook")
"""Order of the rows; branches come after the shared trunk."""


@dataclass(frozen=True)
class HopFacts:
    """What one hop made of a data set; None where it has not run."""

    hop: str
    manifest: Manifest | None

    @property
    def encoding(self) -> str:
        """What codes depend on beside the tokenizer, in words; empty for pictures."""
        encoding: dict[str, Any] = self.manifest.lineage.get("encoding", {}) if self.manifest else {}
        settings = {name.replace("_", " "): _plain(value) for name, value in encoding.items() if name != "view"}
        return "; ".join(f"{name} {value}" for name, value in settings.items())

    @property
    def size(self) -> str:
        """Size of all shards on disk."""
        total = sum(shard.bytes for shard in self.manifest.shards) if self.manifest else 0
        return f"{total / 1e6:.2f} MB" if total < 1e8 else f"{total / 1e9:.2f} GB"


@dataclass(frozen=True)
class DataSet:
    """One data set through all hops."""

    name: str
    card: Card
    hops: tuple[HopFacts, ...]


@dataclass(frozen=True)
class Part:
    """Parameters of one part of a model."""

    name: str
    parameters: int
    trained: int


@dataclass(frozen=True, eq=False)
class StageRun:
    """One training stage of one variant; `summary` is None where it has not run."""

    key: str
    name: str
    stage: Stage
    summary: Summary | None
    history: list[Step]
    codes: np.ndarray | None
    """(prompts, N, D) of the stage's sample prompts."""
    seconds: float | None
    decoder: Path
    """The image tokenizer that decodes them."""

    @property
    def parts(self) -> list[Part]:
        """Parameters by part, in a fixed order."""
        return parts_of(self.summary) if self.summary else []


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One benchmark of one variant; without scores where it has not run."""

    key: str
    name: str
    benchmark: Program
    scores: list[Score]
    drawn: list[Drawn]
    answered: list[Answered]
    codes: np.ndarray | None
    decoder: Path

    @property
    def splits(self) -> list[str]:
        """The splits that occur, in the order of the benchmark."""
        return _ordered({score.split for score in self.scores}, self.benchmark.splits)

    @property
    def names(self) -> list[str]:
        """The scores by name, in the order of the benchmark."""
        return _ordered({score.name for score in self.scores}, self.benchmark.first_scores)

    def score(self, name: str, split: str) -> Score | None:
        """One score."""
        return next((one for one in self.scores if (one.name, one.split) == (name, split)), None)


@dataclass(frozen=True, eq=False)
class VariantRun:
    """One architecture: its stages and its evaluations."""

    name: str
    variant: Variant
    stages: list[StageRun]
    evaluations: list[Evaluation]

    @property
    def parameters(self) -> int | None:
        """Parameters of the model, frozen codebook included; None while no stage has run."""
        known = [sum(part.parameters for part in stage.parts) for stage in self.stages if stage.summary]
        return known[-1] if known else None

    @property
    def seconds(self) -> float | None:
        """Time of all stages; None where the time of one is not known."""
        times = [stage.seconds for stage in self.stages]
        return sum(time for time in times if time is not None) if times and None not in times else None


@dataclass(frozen=True, eq=False)
class Facts:
    """All of it."""

    experiment: Experiment
    benchmarks: dict[str, Program]
    datasets: list[DataSet]
    measures: Measures | None
    variants: list[VariantRun]


def gather(experiment: Experiment, layout: Layout) -> Facts:
    """Read what there is. Raises DataError or ConfigError where something is damaged."""
    benchmarks = {
        name: BENCHMARKS.find(one.kind, f"params.yaml: benchmarks.{name}.kind")
        for name, one in experiment.benchmarks.items()
    }
    return Facts(
        experiment,
        benchmarks,
        [data_set(name, layout) for name in experiment.datasets],
        read_json(layout.image_tokenizer / "report.json", Measures),
        [variant_run(experiment, name, benchmarks, layout) for name in experiment.variants],
    )


def data_set(name: str, layout: Layout) -> DataSet:
    """One data set through all hops."""
    card = load_card(name, layout.cards)
    folders = {"download": layout.raw(name), "filter": layout.filtered(name)}
    folders |= {f"encode, {view}": layout.codes / name / view for view in views_of(card)}
    done = {hop: read_manifest(folder) if (folder / MANIFEST).exists() else None for hop, folder in folders.items()}
    return DataSet(name, card, tuple(HopFacts(hop, manifest) for hop, manifest in done.items()))


def views_of(card: Card) -> list[View]:
    """The views a card's tasks ask for."""
    return [view for view in VIEWS if any(use.view == view for use in card.tasks.values())]


def variant_run(experiment: Experiment, name: str, benchmarks: dict[str, Program], layout: Layout) -> VariantRun:
    """One architecture: its stages and its evaluations."""
    runs = [(key, run) for key, run in experiment.runs.items() if run.variant == name]
    wanted = [(key, entry) for key, entry in experiment.evaluations.items() if entry["variant"] == name]
    return VariantRun(
        name,
        experiment.variants[name],
        [stage_run(key, run.stage, experiment.stages[run.stage], layout) for key, run in runs],
        [
            evaluation(key, entry["benchmark"], benchmarks[entry["benchmark"]], layout.root / entry["model"], layout)
            for key, entry in wanted
        ],
    )


def stage_run(key: str, name: str, stage: Stage, layout: Layout) -> StageRun:
    """One training stage, from what it exported."""
    folder = layout.model(key) / "training"
    summary = read_json(folder / "summary.json", Summary)
    finished = read_json(layout.run(key) / "finished.json", Finished)
    prompts = summary.stage.sample_prompts if summary else ()
    return StageRun(
        key,
        name,
        summary.stage if summary else stage,
        summary,
        read_history(folder / "history.csv"),
        read_codes(folder / "samples.npz", len(prompts)) if prompts else None,
        finished.seconds if finished else None,
        layout.model(key) / MODEL_IMAGE_TOKENIZER,
    )


def evaluation(key: str, name: str, benchmark: Program, model: Path, layout: Layout) -> Evaluation:
    """One benchmark, from its scores and its outputs."""
    folder = layout.scores(key)
    records = read_samples(folder / "outputs" / "samples.jsonl")
    drawn = [one for one in records if isinstance(one, Drawn)]
    return Evaluation(
        key,
        name,
        benchmark,
        read_scores(folder / "metrics.json"),
        drawn,
        [one for one in records if isinstance(one, Answered)],
        read_codes(folder / "outputs" / "codes.npz", len(drawn)) if drawn else None,
        model / MODEL_IMAGE_TOKENIZER,
    )


def parts_of(summary: Summary) -> list[Part]:
    """Parameters of a model by part, trained ones apart."""
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, tensor in summary.tensors.items():
        part = part_of(name)
        total[part] += prod(tensor.shape)
        trained[part] += prod(tensor.shape) * tensor.trained
    branches = sorted(set(total) - set(PARTS))
    order = [*PARTS[:3], *branches, *PARTS[3:]]
    return [Part(name, total[name], trained[name]) for name in order if name in total]


def part_of(tensor: str) -> str:
    """The part of a model that a tensor belongs to: `layers.14.mlp.generation.up_proj.weight` to a branch."""
    branch, start = branch_of(tensor), tensor.partition(".")[0]
    if branch:
        return "shared trunk" if branch == "shared" else f"{branch} branch"
    return {"embed_tokens": "embeddings", "lm_head": "text head"}.get(start, start.replace("_", " "))


def _ordered(found: set[str], first: Sequence[str]) -> list[str]:
    """Names in a given order, others behind them by name."""
    return [*(name for name in first if name in found), *sorted(found - set(first))]


def _plain(value: Any) -> str:
    """Nested settings in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)
