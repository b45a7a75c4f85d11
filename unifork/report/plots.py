"""Numbers to small plots: SVG as data URIs, whose ink follows the light or dark mode of the reader.

In: the steps of a training stage, or the scores of a benchmark. Out: `Plot`s with a title and a text that says the
same to those who cannot see it. Equal numbers give equal bytes: no clock, no random names, no pyplot state.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unifork.evaluation.statistics import Score
from unifork.report.reading import Step

INK = "#010203"
"""Stands for the text colour until the SVG is written; no other colour here may be the same."""
COLORS = ("#3b7dd8", "#d9822b", "#2b9d8f", "#b0569e", "#8a8f2a", "#c4474a", "#6a6fc5", "#7a7a7a")
"""Told apart with every kind of colour vision, and on light and dark grounds."""
STYLE = "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#d5dae0}}</style>"
MOST_POINTS = 250
"""Points per curve; longer histories are averaged, so that a page of long runs stays small."""

SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unifork",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.3,
    **{f"{what}color": INK for what in ("text.", "axes.edge", "axes.label", "grid.", "xtick.", "ytick.")},
}


@dataclass(frozen=True)
class Plot:
    """A picture of numbers."""

    title: str
    src: str
    alt: str


Curve = tuple[str, list[int], list[float]]
"""A name, steps and values."""


def training_plots(history: Sequence[Step]) -> list[Plot]:
    """Losses, gradient norm and learning rate over the steps of a stage; what it does not have is left out."""
    names = list(dict.fromkeys(name for step in history for name in step.values))
    depths = [name for name in names if name.startswith("image_loss_depth_")]
    wanted = {
        "Text loss": _per_track(history, "text_loss"),
        "Image loss": _per_track(history, "image_loss"),
        "Image loss by code depth": [
            curve for depth in depths for curve in _per_track(history, depth, f"depth {depth.rpartition('_')[2]}")
        ],
        "Gradient norm": _per_track(history, "gradient_norm"),
        "Learning rate": _per_track(history, "learning_rate"),
    }
    return [_curves(title, curves) for title, curves in wanted.items() if curves]


def whole_line(stages: Sequence[tuple[str, Sequence[Step]]]) -> bytes:
    """Both losses over all stages of a variant, one after the other, as a PNG for `dvc plots`."""
    with matplotlib.rc_context(SETTINGS | {"axes.edgecolor": "black", "text.color": "black"}):  # type: ignore[arg-type]
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.add_subplot()
        borders = np.cumsum([0, *(len(history) for _, history in stages)])
        for number, name in enumerate(("text_loss", "image_loss")):
            points = [
                (start + index, step.values[name])
                for start, (_, history) in zip(borders, stages, strict=False)
                for index, step in enumerate(history)
                if name in step.values
            ]
            if points:
                x, y = _thinned([x for x, _ in points], [y for _, y in points])
                axes.plot(x, y, color=COLORS[number], label=name.replace("_", " "))
        for start, (name, _) in zip(borders, stages, strict=False):
            axes.axvline(start, color="0.7", linewidth=0.8)
            axes.text(start, 1.0, f" {name}", transform=axes.get_xaxis_transform(), va="top", fontsize=7)
        axes.set_xlabel("step of the line")
        _legend(axes, 2)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
        return stream.getvalue()


def score_plot(title: str, scores: Sequence[Score], splits: Sequence[str], names: Sequence[str]) -> Plot:
    """Bars with standard errors, the splits side by side, and a mark at the chance level of each."""
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        figure = Figure(figsize=(5.2, 0.7 + 0.2 * len(names) * len(splits) + 0.1 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        thickness = 0.8 / max(len(splits), 1)
        for number, split in enumerate(splits):
            rows = [(names.index(s.name), s) for s in scores if s.split == split and s.name in names]
            places = [row + (number + 0.5) * thickness - 0.4 for row, _ in rows]
            axes.barh(
                places,
                [score.value for _, score in rows],
                thickness * 0.9,
                xerr=[score.standard_error for _, score in rows],
                color=COLORS[number % len(COLORS)],
                error_kw={"ecolor": INK, "capsize": 2, "elinewidth": 1},
                label=worded(split),
            )
            ends = (np.array(places) - thickness * 0.45, np.array(places) + thickness * 0.45)
            axes.vlines([score.chance for _, score in rows], *ends, color=INK, linestyle=(0, (1.5, 1)), linewidth=2)
        axes.plot([], [], color=INK, linestyle=(0, (1.5, 1)), linewidth=2, label="chance")
        axes.set_yticks(range(len(names)), [worded(name) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        figure.legend(loc="outside upper right", ncols=len(splits) + 1)
        alt = f"{title}: the scores of the table above as bars, with standard errors and chance levels."
        return Plot(title, _svg(figure), alt)


def worded(name: str) -> str:
    """A name of a score or split as people write it."""
    spoken = {"held_out": "held-out", "yes_no": "yes/no", "_f1": " F1", "_attr": " attribution"}
    for written, words in spoken.items():
        name = name.replace(written, words)
    return name.replace("_", " ")


def _per_track(history: Sequence[Step], name: str, label: str = "") -> list[Curve]:
    """One curve for each track that has the value, over the track's own steps."""
    tracks = list(dict.fromkeys(step.track for step in history))
    found = []
    for track in tracks:
        rows = [step for step in history if step.track == track and name in step.values]
        if rows:
            found.append((label or track, [step.step + 1 for step in rows], [step.values[name] for step in rows]))
    return found


def _curves(title: str, curves: Sequence[Curve]) -> Plot:
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        figure = Figure(figsize=(3.6, 2.3))
        axes = figure.add_axes((0.14, 0.19, 0.84, 0.74))  # a layout engine would draw everything twice
        for number, (label, steps, values) in enumerate(curves):
            axes.plot(*_thinned(steps, values), color=COLORS[number % len(COLORS)], label=label)
        _legend(axes, len(curves))
        axes.set_xlabel("step of the track")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
        said = "; ".join(f"{label}: {values[0]:.3g} to {values[-1]:.3g}" for label, _, values in curves)
        return Plot(title, _svg(figure), f"{title} over {max(curve[1][-1] for curve in curves)} steps. {said}")


def _legend(axes: Axes, curves: int) -> None:
    if curves > 1:
        axes.legend(ncols=2 if curves > 2 else 1, handlelength=1.2, columnspacing=1.0)


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points, each the mean of neighbouring steps."""
    groups = np.array_split(np.arange(len(steps)), min(len(steps), MOST_POINTS))
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    return [float(x[group].mean()) for group in groups], [float(y[group].mean()) for group in groups]


def _svg(figure: Figure) -> str:
    """The figure as a data URI; its ink becomes the colour of the reader's mode."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    head, _, body = stream.getvalue().partition("<defs>")
    svg = f"{head}{STYLE}<defs>{body}".replace(INK, "currentColor")
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
