"""What an analysis reads and writes: the documents of a run in, an experiment's results as JSON and SVG out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unifork.config import Experiment
from unifork.documents.mixture import CodesIdentity, MixturePart
from unifork.errors import DataError, unknown
from unifork.figures import LOOK, svg
from unifork.inference import Engine
from unifork.layout import Layout
from unifork.shards.manifest import write_atomically, write_json
from unifork.vocabulary import Task

Curve = Mapping[str, Any]
"""`x` and `y`; `error` (standard errors) where there are some; everything else goes to matplotlib."""


def parts_of(
    run: str, experiment: Experiment, layout: Layout, engine: Engine, *, held_out: bool, task: Task | None = None
) -> list[MixturePart]:
    """The parts of a run's mixtures, of one task or of both, each once; those without documents are left out."""
    if run not in experiment.runs:
        raise unknown("run", run, experiment.runs, "params.yaml: runs")
    stage, model = experiment.stages[experiment.runs[run].stage], engine.model.config
    identity = CodesIdentity(model.positions, model.depth, model.codebook_id, model.encoder_id, model.codebook_size)
    entries = {e.prepared: e for track in stage.tracks.values() for e in track.mixture if task in (None, e.task)}
    parts = [
        MixturePart(entry, layout, engine.tokenizer, identity, stage.context, held_out=held_out)
        for entry in entries.values()
    ]
    return [part for part in parts if len(part)]


def captions_of(
    run: str, experiment: Experiment, layout: Layout, engine: Engine, most: int, seed: int
) -> tuple[list[str], str]:
    """Distinct captions that the last stage of a run's variant draws, in an order by the seed, and what rows they are.

    Of held-out rows; where no card holds rows out, of those that are trained on. Raises DataError without any.
    """
    if run in experiment.runs:
        variant = experiment.variants[experiment.runs[run].variant]
        run = f"{experiment.runs[run].variant}-{variant.stages[-1]}"
    for held_out in (True, False):
        parts = parts_of(run, experiment, layout, engine, held_out=held_out, task="generation")
        places = [(part, index) for part in parts for index in range(len(part))]
        found: dict[str, None] = {}
        for number in np.random.default_rng(seed).permutation(len(places)):
            part, index = places[number]
            found.setdefault(engine.caption(part.entry.template, part.document(index)))
            if len(found) == most:
                break
        if found:
            return list(found), f"{'held-out' if held_out else 'trained-on'} rows of {run}"
    raise DataError(f"{run}: its stage has no documents of the task generation; give --prompts FILE")


def write(out: Path, name: str, found: Mapping[str, Any], figure: str) -> None:
    """OUT/name.json and OUT/name.svg."""
    write_atomically(out / f"{name}.svg", lambda path: path.write_text(figure))
    write_json(out / f"{name}.json", found)


def drawn(
    curves: Sequence[Curve], labels: tuple[str, str], band: Sequence[Sequence[float]] = (), mark: float | None = None
) -> str:
    """Curves over layers or orders as SVG. band: low and high of chance at each x of the first curve. mark: the fork."""
    with matplotlib.rc_context(fname=LOOK):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            style = {"marker": "." if len(curve["x"]) > 1 else "o", **curve}
            axes.errorbar(style.pop("x"), style.pop("y"), yerr=style.pop("error", None), capsize=2, **style)
        if band:
            axes.fill_between(curves[0]["x"], *band, color="0.5", alpha=0.3, linewidth=0, label="chance, 95 %")
        if mark is not None:
            axes.axvline(mark, color="0.5", linestyle=":", label="fork")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=3)
        return svg(figure)
