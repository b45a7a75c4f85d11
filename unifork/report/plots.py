"""Numbers to small plots: SVG as data URIs, whose ink follows the light or dark mode of the reader.

In: what the stages of every variant recorded. Out: one `Plot` for each quantity, a color for each variant, with a text
that says the same to those who cannot see it and a link to its points. Equal numbers give equal bytes: no clock, no
random names, no pyplot state. How plots look is in `unifork/figures.py`.
"""

import json
from collections.abc import Mapping, Sequence
from fnmatch import filter as matching
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from unifork.analysis.results import Alignment
from unifork.config import Experiment
from unifork.figures import INK, LOOK, svg
from unifork.layout import Layout
from unifork.report.reading import read_json
from unifork.report.tables import csv_of, data_uri

MOST_POINTS = 250
"""Points per curve; longer histories are averaged, so that a page of long runs stays small."""
DASHES: Sequence[Any] = ("-", (0, (4, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1.5, 1.5)), (0, (8, 2)), (0, (3, 3)))
"""What tells the curves of a variant apart."""
CHARTS = {
    "Text loss": ("text_loss", False), "Image loss": ("image_loss", False),
    "Image loss by code depth": ("image_loss_depth_*", False), "Gradient norm": ("gradient_norm", True),
    "Learning rate": ("learning_rate", True), "Tokens per step": ("tokens", True), "Fill of rows": ("fill", True),
    "Tokens per second": ("tokens_per_second", False), "Documents per second": ("documents_per_second", False),
    "Peak memory, GiB": ("memory_gib", False),
}  # fmt: skip
"""Title: columns of what was recorded, and whether each track has a curve of its own."""
LOSSES = ("Text loss", "Image loss")
AXES: Mapping[str, Any] = {"tokens": "top", "documents": -0.22}
"""What else a step has a number of, and where its axis stands."""

Step = Mapping[str, Any]
"""`track`, `step`, and the values that the step has, by name."""


class Recorded(NamedTuple):
    """What a finished stage recorded: its steps, and beside them, after so many `finished_steps`, other rows."""

    stage: str
    history: Sequence[Step]
    beside: Sequence[Mapping[str, Any]] = ()
    """Losses on held-out rows, each of a `part`, and rates."""
    before: int = 0
    """Steps of the stages before it."""


Lines = Mapping[str, Sequence[Recorded]]
"""The finished stages of each variant, in order."""
Curves = Mapping[tuple[str, str], np.ndarray]
"""By variant and what it is of (nothing for the value itself): steps of the line and values, (points, 2)."""


class Plot(NamedTuple):
    """An image of numbers, and the address of a file that holds them."""

    title: str
    src: str
    alt: str
    numbers: str


Groups = Mapping[str, Mapping[int, str]]
"""Variants that are alike but for their training seeds: their names by seed."""


@matplotlib.rc_context(fname=LOOK)
def training_plots(lines: Lines, groups: Groups) -> list[Plot]:
    """A plot for each quantity that a history has; a color for each group."""
    found = []
    for title in CHARTS:
        if curves := curves_of(lines, title):
            ranges = "; ".join(
                f"{', '.join(filter(None, key))}: {a[0, 1]:.3g} to {a[-1, 1]:.3g}" for key, a in curves.items()
            )
            alt = f"{title} over {max(a[-1, 0] for a in curves.values()):.0f} steps. {ranges}"
            found.append(plot(title, _figure(curves, lines, groups), alt, _table(curves)))
    return found


def plot(title: str, figure: Figure, alt: str, rows: Sequence[Sequence[Any]]) -> Plot:
    """A figure and its numbers. rows: the first are titles."""
    return Plot(title, data_uri("image/svg+xml", svg(figure).encode()), alt, data_uri("text/csv", csv_of(rows)))


def alignments(experiment: Experiment, layout: Layout) -> list[Plot]:
    """The figures of models whose alignment was analyzed, of the first training seeds."""
    plots = []
    for key in experiment.analyzed:
        path = layout.analysis(key) / "alignment.json"
        found = read_json(path, Alignment)
        if found and experiment.runs[key].variant in experiment.firsts.values():
            ranges = (f"{task} {c['score'][0]:.2f} to {c['score'][-1]:.2f}" for task, c in found["curves"].items())
            alt = f"Alignment by layer after {key}, from the first to the last: {'; '.join(ranges)}."
            figure = data_uri("image/svg+xml", path.with_suffix(".svg").read_bytes())
            plots.append(Plot(key, figure, alt, data_uri("application/json", path.read_bytes())))
    return plots


def loss_files(lines: Lines) -> dict[str, bytes]:
    """Plots and metrics of DVC by file name: the curves of the losses, and where each of them ends."""
    files, last = dict[str, bytes](), dict[str, float]()
    for title in LOSSES:
        name = title.lower().replace(" ", "_")
        if curves := curves_of(lines, title):
            files[f"losses/{name}.csv"] = csv_of(_table(curves))
        for (variant, of), points in curves.items():
            key = ".".join(filter(None, (variant, name, of.replace("held out: ", "held_out."))))
            last[key] = round(float(_short(points)[-1, 1]), 6)
    return files | {"losses.json": json.dumps(last, indent=1).encode()}


def curves_of(lines: Lines, title: str) -> Curves:
    """The curves of a plot."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    column, by_track = CHARTS[title]
    for variant, stage in _stages(lines):
        for number, step in enumerate(stage.history, stage.before + 1):
            for name in matching(step, column):
                part = step["track"] if by_track else name.replace(column.rstrip("*"), "depth ") * ("*" in column)
                points.setdefault((variant, part), []).append((number, step[name]))
        for row in stage.beside:
            if column in row:
                part = f"held out: {row['part']}" if "part" in row else ""
                points.setdefault((variant, part), []).append((stage.before + row["finished_steps"], row[column]))
    return {key: np.array(found) for key, found in points.items()}


def _stages(lines: Lines) -> list[tuple[str, Recorded]]:
    return [(variant, stage) for variant, stages in lines.items() for stage in stages]


def _short(points: np.ndarray) -> np.ndarray:
    """At most MOST_POINTS points, means of neighboring ones."""
    return np.array([part.mean(axis=0) for part in np.array_split(points, min(len(points), MOST_POINTS))])


def _table(curves: Curves) -> list[list[str]]:
    rows = [[*key, f"{x:g}", f"{y:.6g}"] for key, found in curves.items() for x, y in _short(found)]
    return [["variant", "of", "step", "value"], *rows]


def _figure(curves: Curves, lines: Lines, groups: Groups) -> Figure:
    """Variants by color, their seeds as thin lines, parts by dashes, stages by marks; AXES where they are recorded."""
    group_of = {name: group for group, seeds in groups.items() for name in seeds.values()}
    color = {group: f"C{number}" for number, group in enumerate(groups)}
    parts = dict.fromkeys(part for _, part in curves)
    dash = {part: DASHES[number % len(DASHES)] for number, part in enumerate(parts)}
    shown, width = dict.fromkeys(group_of[variant] for variant, _ in curves), 1.3 if len(groups) == len(lines) else 0.7
    marks = [Line2D([], [], color=color[group], label=group) for group in shown if len(shown) > 1]
    marks += [
        Line2D([], [], color=INK, linestyle=dash[part], label=part or "trained on") for part in dash if len(dash) > 1
    ]
    columns = 1 if any(len(str(mark.get_label())) > 30 for mark in marks) else 2
    height = 3.3 + 0.16 * -(-len(marks) // columns)
    figure = Figure(figsize=(5.4, height))
    axes = figure.add_axes((0.1, 0.82 / height, 0.88, 2.0 / height))  # a layout engine would draw everything twice
    for (variant, part), found in curves.items():
        look = {"color": color[group_of[variant]], "linestyle": dash[part], "linewidth": width, "alpha": 0.9}
        axes.plot(*_short(found).T, **look)
    for start, name in dict.fromkeys((stage.before, stage.stage) for _, stage in _stages(lines)):
        axes.axvline(start, color=INK, linewidth=0.6, alpha=0.4)
        axes.text(start, 1.0, f" {name}", transform=axes.get_xaxis_transform(), va="top", fontsize=7)
    axes.set_xlim(0, max(found[-1, 0] for found in curves.values()) + 0.5)
    axes.set_xlabel("step of all stages")
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=False)
    first = next(variant for variant, _ in curves)
    for what, place in AXES.items():
        counts = [step.get(what, 0.0) for stage in lines[first] for step in stage.history]
        if all(counts):
            seen = np.array([0, *np.cumsum(counts)])
            ticks = [tick for tick in MaxNLocator(4).tick_values(0, seen[-1]) if tick <= 0.97 * seen[-1]]  # labels fit
            beside = axes.secondary_xaxis(place)
            beside.set_ticks(np.interp(ticks, seen, np.arange(len(seen))).tolist(), [f"{tick:g}" for tick in ticks])
            beside.set_xlabel(f"{what} of {first}" if len(lines) > 1 else what, fontsize=8)
    figure.legend(handles=marks, loc="upper left", ncols=columns, handlelength=2.4)
    return figure
