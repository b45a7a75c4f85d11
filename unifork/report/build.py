"""Facts, pictures and plots to one HTML page that needs nothing else: no network, no script, no further file.

In: an experiment, its folders and a way to load image tokenizers. Out: the text of `index.html`. What
has not run yet is said to be missing, so that a page can be made at any time; damaged files raise a UniForkError.
"""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml

from unifork.config import Experiment
from unifork.evaluation.statistics import Score
from unifork.image_tokenizer.architecture import architecture_of
from unifork.layout import Layout
from unifork.report import pictures
from unifork.report.codec import LoadCodec
from unifork.report.gather import Evaluation, Facts, StageRun, VariantRun, gather
from unifork.report.pictures import DataPictures, Picture, Shown
from unifork.report.plots import Plot, score_plot, training_plots, whole_line, worded
from unifork.report.reading import Same
from unifork.report.surroundings import surroundings

REPORT_VERSION = 1
"""Raise when the same experiment should be shown otherwise."""


@dataclass(frozen=True)
class Headline:
    """One score of a benchmark, for each split that of all variants; None where it is not there yet."""

    label: str
    lines: dict[str, list[Score | None]]


@dataclass(frozen=True, eq=False)
class StageView:
    """A training stage as it is shown."""

    run: StageRun
    plots: list[Plot]
    pictures: dict[str, Picture]


@dataclass(frozen=True, eq=False)
class EvaluationView:
    """A benchmark as it is shown."""

    found: Evaluation
    plot: Plot | None
    drawn: dict[str, dict[str, list[Shown]]]
    answered: list[Shown]

    @property
    def same(self) -> str:
        """What all scores have in common, in words."""
        scores = self.found.scores
        parts = {"seed": {score.seed for score in scores}, "samples": {score.samples for score in scores}}
        return "; ".join(f"{name} {min(values)}" for name, values in parts.items() if len(values) == 1)

    @property
    def samples_differ(self) -> bool:
        """Whether the table needs a column for the number of samples."""
        return len({score.samples for score in self.found.scores}) > 1


@dataclass(frozen=True, eq=False)
class VariantView:
    """An architecture as it is shown."""

    run: VariantRun
    stages: list[StageView]
    evaluations: list[EvaluationView]

    @property
    def prompts(self) -> list[str]:
        """Sample prompts of all stages, in order of appearance."""
        return list(dict.fromkeys(prompt for stage in self.stages for prompt in stage.run.stage.sample_prompts))

    @property
    def parts(self) -> list[str]:
        """Parts of the model, in order."""
        return list(dict.fromkeys(part.name for stage in self.stages for part in stage.run.parts))


def loss_pictures(experiment: Experiment, layout: Layout) -> dict[str, bytes]:
    """For each variant that has been trained, its losses over all stages, as a PNG."""
    runs = {
        one.name: [(run.name, run.history) for run in one.stages if run.history]
        for one in gather(experiment, layout).variants
    }
    return {name: whole_line(stages) for name, stages in runs.items() if stages}


def build(experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> str:
    """The page, with the git revision of the layout's root."""
    facts = gather(experiment, layout)
    data = _data(facts, layout, load_codec)
    return render(
        experiment=experiment,
        params=yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100),
        program=version("unifork"),
        here=surroundings(layout.root),
        headlines=headlines(facts),
        notes=[one.note for one in facts.benchmarks.values() if one.note],
        datasets=[(one, data[one.name]) for one in facts.datasets],
        view_notes=pictures.VIEW_NOTES,
        measures=facts.measures,
        tokenizer=architecture_of(experiment.image_tokenizer, layout.image_tokenizer),
        detector=_detector(facts, data),
        detector_measured_here=not (facts.measures and facts.measures.detector),
        variants=[_variant(run, load_codec) for run in facts.variants],
    )


def headlines(facts: Facts) -> list[Headline]:
    """The scores of the summary, as the experiment's benchmarks wish."""
    return [
        Headline(title, {split: [_headline(run, name, score, split) for run in facts.variants] for split in one.splits})
        for name, one in facts.benchmarks.items()
        for score, title in one.headlines.items()
    ]


def render(**values: Any) -> str:
    """The template with its values; every text is escaped."""
    return _environment().get_template("page.html").render(values)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"worded": worded, "count": count, "duration": duration}
    environment.tests |= {"web": lambda address: str(address).startswith(("https://", "http://"))}
    return environment


def count(number: int) -> str:
    """A number of things: exact up to a million, with thin spaces; millions above."""
    return f"{number:,}".replace(",", "\u202f") if number < 1_000_000 else f"{number / 1e6:.2f}\u202fM"


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "not measured"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _headline(run: VariantRun, benchmark: str, score: str, split: str) -> Score | None:
    return next((one.score(score, split) for one in run.evaluations if one.name == benchmark), None)


def _data(facts: Facts, layout: Layout, load_codec: LoadCodec) -> dict[str, DataPictures | None]:
    there = (layout.image_tokenizer / "config.json").exists()
    codec = load_codec(layout.image_tokenizer) if there else None
    size = facts.experiment.image_tokenizer.image_size
    return {one.name: pictures.data_pictures(one, layout.filtered(one.name), size, codec) for one in facts.datasets}


def _detector(facts: Facts, data: dict[str, DataPictures | None]) -> dict[str, Same]:
    """What the tokenizer's own report says, else what was measured on the pictures of this page."""
    if facts.measures and facts.measures.detector:
        return facts.measures.detector
    return {f"{name}/{view}": same for name, shown in data.items() if shown for view, same in shown.detector.items()}


def _variant(run: VariantRun, load_codec: LoadCodec) -> VariantView:
    stages = [_stage(one, load_codec) for one in run.stages]
    return VariantView(run, stages, [_evaluation(one, load_codec) for one in run.evaluations])


def _stage(run: StageRun, load_codec: LoadCodec) -> StageView:
    drawn = pictures.stage_pictures(run, load_codec(run.decoder)) if run.codes is not None else {}
    return StageView(run, training_plots(run.history), drawn)


def _evaluation(found: Evaluation, load_codec: LoadCodec) -> EvaluationView:
    plot = score_plot(found.key, found.scores, found.splits, found.names) if found.scores else None
    drawn = pictures.drawn_pictures(found, load_codec(found.decoder)) if found.codes is not None else {}
    return EvaluationView(found, plot, drawn, pictures.answered_questions(found))
