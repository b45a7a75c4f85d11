"""Facts, images and plots to one HTML page that needs nothing else: no network, no script, no further file.

In: an experiment, its folders and a way to load image tokenizers. Out: the text of `index.html`. What
has not run yet is said to be missing, so that a page can be made at any time; damaged files raise a UniForkError.
"""

import json
from datetime import UTC, datetime
from importlib.metadata import version

import yaml

from unifork.config import Experiment
from unifork.layout import Layout
from unifork.report import training
from unifork.report.band import band
from unifork.report.codec import LoadCodec
from unifork.report.gather import dataset, tokenizer
from unifork.report.images import grid
from unifork.report.plots import alignment, training_plots
from unifork.report.scores import benchmark, headlines, losses
from unifork.report.study_page import architectures, curves
from unifork.report.study_record import found_here
from unifork.report.surroundings import surroundings
from unifork.report.tables import data_uri, rendered

REPORT_VERSION = 9
"""Raise when the same experiment should be shown otherwise."""
FIRST = 8
"""Images of the last stage on the first screen, for each variant."""


def build(experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> str:
    """The page, with the git revision of the layout's root."""
    stages = training.stages_of(experiment, layout, load_codec)
    firsts = {min(seeds.items())[1] for seeds in experiment.groups.values()}
    shown = [stage for stage in stages if stage.variant in firsts]
    last = {stage.variant: stage for stage in stages if stage.drawn}
    ended = max((stage.progress.get("written", 0) for stage in stages), default=0)
    benchmarks = [benchmark(name, experiment, layout) for name in experiment.all_benchmarks]
    lines = training.lines_of(experiment, layout)
    first = grid("First images", [(stage.title, stage.drawn[:FIRST]) for stage in last.values()])
    if not first.rows:
        first = training.held_out_images(list({stage.variant: stage for stage in stages if stage.held_out}.values()))
    here, cards = surroundings(layout.root), {shown["card"].name: shown["card"] for shown in benchmarks}
    several = len(experiment.groups) > 1 and len(experiment.seeds) > 1
    study = found_here(experiment, layout, here) if several else None
    numbers = {shown["card"].name: shown["numbers"] for shown in benchmarks}
    return rendered(
        "page.html",
        experiment=experiment,
        params=yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100),
        program=version("unifork"),
        here=here,
        ended=f"{datetime.fromtimestamp(ended, UTC):%Y-%m-%d}" if ended else "not known",
        time=training.total([stage.seconds for stage in stages]),
        first=first,
        numbers=data_uri("application/json", json.dumps(numbers, indent=1).encode()),
        benchmarks=benchmarks,
        headlines=headlines(benchmarks, losses(experiment, layout)),
        band=band(experiment, layout),
        datasets=[dataset(name, experiment, layout, load_codec) for name in experiment.datasets],
        tokenizer=tokenizer(experiment, layout),
        variants=training.overview(experiment, stages),
        runs=training.runs_table(stages),
        references=training.references_table(experiment, layout, stages),
        plots=training_plots(lines, experiment.groups),
        parameters=training.parameters_table(shown),
        mixtures=training.mixtures_table(stages),
        quarantined=training.quarantined(stages),
        held_out_numbers=training.held_out_numbers(shown, lines),
        held_out=training.held_out_tables(shown),
        held_out_images=training.held_out_images(shown),
        architectures=architectures(study, cards) if study and benchmarks else None,
        curves=curves(study) if study else [],
        alignments=[
            plot
            for key in experiment.analyzed
            if experiment.runs[key].variant in firsts and (plot := alignment(key, layout))
        ],
        images=training.images_after_stages(shown),
    )
