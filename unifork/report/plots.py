"""Numbers to small plots: SVG as data URIs, whose ink follows the light or dark mode of the reader.

In: the steps of a training stage, or the scores of a benchmark. Out: `Plot`s with a title and a text that says the
same to those who cannot see it. Equal numbers give equal bytes: no clock, no random names, no pyplot state.
How they look is in `unifork/figures.py`.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unifork.evaluation.statistics import Score
from unifork.figures import CHANCE, INK, LOOK, data_uri, svg

MOST_POINTS = 250
"""Points per curve; longer histories are averaged, so that a page of long runs stays small."""

Step = Mapping[str, Any]
"""`track`, `step`, and the values that the step has, by name."""
Curve = tuple[str, Sequence[tuple[float, float]]]
"""A name, and points."""


class Plot(NamedTuple):
    """An image of numbers."""

    title: str
    src: str
    alt: str


def training_plots(history: Sequence[Step]) -> list[Plot]:
    """Losses, gradient norm and learning rate over the steps of a stage; what it does not have is left out."""
    depths = dict.fromkeys(name for step in history for name in step if name.startswith("image_loss_depth_"))
    by_depth = [(f"depth {name.rpartition('_')[2]}", points) for name in depths for _, points in _tracks(history, name)]
    wanted = {
        "Text loss": _tracks(history, "text_loss"),
        "Image loss": _tracks(history, "image_loss"),
        "Image loss by code depth": by_depth,
        "Gradient norm": _tracks(history, "gradient_norm"),
        "Learning rate": _tracks(history, "learning_rate"),
    }
    return [_over_steps(title, curves) for title, curves in wanted.items() if curves]


def validation_plots(rows: Sequence[Step]) -> list[Plot]:
    """Losses on held-out rows over the steps of a stage, a curve for each part of a mixture."""
    wanted = {"Text loss, held out": "text_loss", "Image loss, held out": "image_loss"}
    found = {title: _parts(rows, name) for title, name in wanted.items()}
    return [_over_steps(title, curves, "steps done") for title, curves in found.items() if curves]


def whole_line(stages: Sequence[tuple[str, Sequence[Step]]]) -> bytes:
    """Both losses over all stages of a variant, one after the other, as a PNG for `dvc plots`."""
    steps = [step for _, history in stages for step in history]
    with matplotlib.rc_context(fname=LOOK):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.add_subplot()
        curves = [
            (name.replace("_", " "), [(place, step[name]) for place, step in enumerate(steps) if name in step])
            for name in ("text_loss", "image_loss")
        ]
        _draw(axes, curves)
        start = 0
        for name, history in stages:
            axes.axvline(start, color="0.7", linewidth=0.8)
            axes.text(start, 1.0, f" {name}", transform=axes.get_xaxis_transform(), va="top", fontsize=7)
            start += len(history)
        axes.set_xlabel("step of the line")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
        return stream.getvalue()


def score_plot(title: str, scores: Mapping[str, Mapping[str, Score]], names: Sequence[str]) -> Plot:
    """Bars with standard errors, the splits side by side, and a mark at the chance level of each.

    scores: by split and name. names: of all scores, in the order of the rows.
    """
    with matplotlib.rc_context(fname=LOOK):
        figure = Figure(figsize=(5.2, 0.7 + 0.2 * len(names) * len(scores) + 0.1 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        thickness = 0.8 / len(scores)
        for number, (split, found) in enumerate(scores.items()):
            places = np.array([names.index(name) for name in found]) + (number + 0.5) * thickness - 0.4
            axes.barh(
                places,
                [score.value for score in found.values()],
                thickness * 0.9,
                xerr=[score.standard_error or 0.0 for score in found.values()],
                error_kw={"ecolor": INK, "capsize": 2, "elinewidth": 1},
                label=worded(split),
            )
            chances = [score.chance for score in found.values()]
            axes.vlines(chances, places - thickness * 0.45, places + thickness * 0.45, **CHANCE)
        axes.plot([], [], **CHANCE, label="chance")
        axes.set_yticks(range(len(names)), [worded(name) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        figure.legend(loc="outside upper right", ncols=len(scores) + 1)
        alt = f"{title}: the scores of the table above as bars, with standard errors and chance levels."
        return Plot(title, data_uri(svg(figure)), alt)


def worded(name: str) -> str:
    """A name of a score or split as people write it."""
    spoken = {"held_out": "held-out", "yes_no": "yes/no", "_f1": " F1", "_attr": " attribution"}
    for written, words in spoken.items():
        name = name.replace(written, words)
    return name.replace("_", " ")


def _tracks(history: Sequence[Step], name: str) -> list[Curve]:
    """One curve for each track that has the value, over the track's own steps."""
    points: dict[str, list[tuple[float, float]]] = {}
    for step in history:
        if name in step:
            points.setdefault(step["track"], []).append((step["step"] + 1, step[name]))
    return list(points.items())


def _parts(rows: Sequence[Step], name: str) -> list[Curve]:
    """One curve for each track and part that has the value, over the steps of all tracks."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if name in row:
            points.setdefault(f"{row['track']}: {row['part']}", []).append((row["finished_steps"], row[name]))
    return list(points.items())


def _over_steps(title: str, curves: Sequence[Curve], steps: str = "step of the track") -> Plot:
    with matplotlib.rc_context(fname=LOOK):
        figure = Figure(figsize=(3.6, 2.3))
        axes = figure.add_axes((0.14, 0.19, 0.84, 0.74))  # a layout engine would draw everything twice
        _draw(axes, curves)
        axes.set_xlabel(steps)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
        ranges = "; ".join(f"{label}: {points[0][1]:.3g} to {points[-1][1]:.3g}" for label, points in curves)
        last = max(points[-1][0] for _, points in curves)
        return Plot(title, data_uri(svg(figure)), f"{title} over {last:.0f} steps. {ranges}")


def _draw(axes: Axes, curves: Sequence[Curve]) -> None:
    """Every curve in a color of its own, with at most MOST_POINTS points: each the mean of neighbouring ones."""
    for number, (label, points) in enumerate(curves):
        if points:
            parts = np.array_split(np.array(points), min(len(points), MOST_POINTS))
            axes.plot(*np.transpose([part.mean(axis=0) for part in parts]), color=f"C{number}", label=label)
    if len(curves) > 1:
        axes.legend(ncols=2 if len(curves) > 2 else 1, handlelength=1.2, columnspacing=1.0)
