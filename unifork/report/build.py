"""What an experiment left to one HTML page that needs nothing else: no network, no script, no further file.

In: an experiment, its folders and a way to load image tokenizers. Out: the text of `index.html`. What
has not run yet is said to be missing, so that a page can be made at any time; damaged files raise a UniForkError.
Sections and tables stand in `page.html` and `models.html`; here is what they are given.
"""

import json
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import yaml

from unifork.config import Experiment, load_card
from unifork.image_tokenizer.architecture import CONFIG_FILE, architecture_of
from unifork.image_tokenizer.measures import REPORT, Report
from unifork.layout import Layout
from unifork.report import training
from unifork.report.band import band
from unifork.report.codec import LoadCodec
from unifork.report.images import data_images, grid, rejected_rows, views_of
from unifork.report.plots import alignments, training_plots
from unifork.report.reading import read_json
from unifork.report.scores import benchmark, headlines, losses
from unifork.report.study_page import architectures, curves
from unifork.report.study_record import found_here
from unifork.report.surroundings import surroundings
from unifork.report.tables import data_uri, rendered
from unifork.shards.job import KeptRows
from unifork.shards.manifest import MANIFEST, elsewhere, read_manifest
from unifork.shards.task import warnings_of

REPORT_VERSION = 10
"""Raise when the same experiment should be shown otherwise."""
FIRST = 8
"""Images of the last stage on the first screen, for each variant."""


def build(experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> str:
    """The page, with the git revision of the layout's root."""
    stages = training.stages_of(experiment, layout, load_codec)
    shown = [stage for stage in stages if stage.variant in experiment.firsts.values()]
    last = {stage.variant: stage for stage in stages if stage.drawn}
    first = grid("First images", [(stage.title, stage.drawn[:FIRST]) for stage in last.values()])
    if not first.rows:
        first = training.held_out_images([*{stage.variant: stage for stage in stages if stage.held_out}.values()])
    here = surroundings(layout.root)
    benchmarks = [benchmark(name, experiment, layout) for name in experiment.all_benchmarks]
    several = len(experiment.groups) > 1 and len(experiment.seeds) > 1
    study = found_here(experiment, layout, here) if several else None
    cards = {found["card"].name: found["card"] for found in benchmarks}
    numbers = {found["card"].name: found["numbers"] for found in benchmarks}
    ended = max((stage.progress.get("written", 0) for stage in stages), default=0)
    return rendered(
        "page.html",
        experiment=experiment,
        params=yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100),
        program=version("unifork"),
        here=here,
        ended=f"{datetime.fromtimestamp(ended, UTC):%Y-%m-%d}" if ended else "not known",
        seconds=training.total(stages),
        first=first,
        numbers=data_uri("application/json", json.dumps(numbers, indent=1).encode()),
        benchmarks=benchmarks,
        headlines=headlines([row for found in benchmarks for row in found["headlines"]] + losses(experiment, layout)),
        band=band(experiment, layout),
        datasets=[dataset(name, experiment, layout, load_codec) for name in experiment.datasets],
        tokenizer=read_json(layout.image_tokenizer / REPORT, Report),
        tokenizer_form=architecture_of(experiment.image_tokenizer, layout.image_tokenizer),
        stages=stages,
        variants=training.overview(experiment, stages),
        answered={stage.title: stage.held_out for stage in shown if stage.held_out and stage.held_out["scores"]},
        held_out={stage.variant: stage for stage in shown if stage.held_out},
        plots=training_plots(training.lines_of(experiment, layout), experiment.groups),
        parameters=training.parameters_table(shown),
        held_out_images=training.held_out_images(shown),
        architectures=architectures(study, cards) if study and benchmarks else None,
        curves=curves(study) if study else [],
        alignments=alignments(experiment, layout),
        images=grid(
            "Images after each stage", [(stage.title, stage.drawn if stage.summary else None) for stage in shown]
        ),
    )


def dataset(name: str, experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> dict[str, Any]:
    """One data set: its card, the manifests of all stages, and images of what the filter kept and dropped."""
    card = load_card(name, layout.cards)
    folders = {"download": layout.raw(name), "filter": layout.filtered(name)}
    folders |= {f"encode, {view}": layout.codes / name / view for view in views_of(card)}
    stages = {title: read_manifest(at) if (at / MANIFEST).exists() else None for title, at in folders.items()}
    images, rejected = grid("Images", []), []
    if stages["filter"] and not elsewhere(layout.raw(name)):
        tokenizer, size = layout.image_tokenizer, experiment.image_tokenizer.image_size
        codec, kept = load_codec(tokenizer) if (tokenizer / CONFIG_FILE).exists() else None, KeptRows(layout, name)
        images, rejected = data_images(card, kept, size, codec), rejected_rows(kept)
    warnings = [
        line
        for title in ("download", "filter")
        if (manifest := stages[title])
        for line in warnings_of(manifest, title, card.losses)
    ]
    return {
        "name": name, "card": card, "stages": stages, "images": images, "rejected": rejected, "warnings": warnings,
    }  # fmt: skip
