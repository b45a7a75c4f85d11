"""Facts, images and plots to one HTML page that needs nothing else: no network, no script, no further file.

In: an experiment, its folders and a way to load image tokenizers. Out: the text of `index.html`. What
has not run yet is said to be missing, so that a page can be made at any time; damaged files raise a UniForkError.
"""

from importlib.metadata import version
from pathlib import Path

import jinja2
import yaml

from unifork.config import Experiment
from unifork.image_tokenizer.architecture import architecture_of
from unifork.layout import Layout
from unifork.report.codec import LoadCodec
from unifork.report.gather import benchmarks, dataset, history_of, runs_of, variant
from unifork.report.plots import whole_line, worded
from unifork.report.reading import read_json
from unifork.report.surroundings import surroundings

REPORT_VERSION = 3
"""Raise when the same experiment should be shown otherwise."""


def build(experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> str:
    """The page, with the git revision of the layout's root."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"worded": worded, "count": count, "duration": duration}
    datasets = [dataset(name, experiment, layout, load_codec) for name in experiment.datasets]
    return environment.get_template("page.html").render(
        experiment=experiment,
        params=yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100),
        program=version("unifork"),
        here=surroundings(layout.root),
        benchmarks=benchmarks(experiment, layout),
        datasets=datasets,
        detector_here={
            f"{gathered['name']}/{view}": same
            for gathered in datasets
            if gathered["shown"]
            for view, same in gathered["shown"]["detector"].items()
        },
        measures=read_json(layout.image_tokenizer / "report.json"),
        tokenizer=architecture_of(experiment.image_tokenizer, layout.image_tokenizer),
        variants=[variant(name, experiment, layout, load_codec) for name in experiment.variants],
    )


def loss_images(experiment: Experiment, layout: Layout) -> dict[str, bytes]:
    """For each variant that has been trained, its losses over all stages, as a PNG."""
    lines = {
        name: [
            (experiment.runs[key].stage, steps)
            for key in runs_of(name, experiment)
            if (steps := history_of(key, layout))
        ]
        for name in experiment.variants
    }
    return {name: whole_line(stages) for name, stages in lines.items() if stages}


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
