"""Numbers to small plots: SVG as data URIs, whose ink follows the light or dark mode of the reader.

In: what the stages of every variant recorded. Out: one `Plot` for each quantity, a color for each variant, with a text
that says the same to those who cannot see it and a link to its points. Equal numbers give equal bytes: no clock, no
random names, no pyplot state. How plots look is in `unifork/figures.py`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import filter as matching
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

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
}  # fmt: skip
"""Title: columns of a history, and whether each track has a curve of its own."""
LOSSES = ("Text loss", "Image loss")

Step = Mapping[str, Any]
"""`track`, `step`, and the values that the step has, by name."""


class Recorded(NamedTuple):
    """What a finished stage recorded: its steps, and losses on held-out rows."""

    stage: str
    history: Sequence[Step]
    validation: Sequence[Step] = ()


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


def training_plots(lines: Lines, groups: Groups) -> list[Plot]:
    """A plot for each quantity that a history has; a color for each group."""
    found = []
    for title in CHARTS:
        if curves := curves_of(lines, title):
            ranges = "; ".join(
                f"{', '.join(filter(None, key))}: {a[0, 1]:.3g} to {a[-1, 1]:.3g}" for key, a in curves.items()
            )
            alt = f"{title} over {max(a[-1, 0] for a in curves.values()):.0f} steps. {ranges}"
            with matplotlib.rc_context(fname=LOOK):
                src = data_uri("image/svg+xml", svg(_figure(curves, lines, groups)).encode())
            found.append(Plot(title, src, alt, data_uri("text/csv", _table(curves))))
    return found


def alignment(key: str, layout: Layout) -> Plot | None:
    """The curves of a run's model, where its alignment was analyzed."""
    folder = layout.analysis(key)
    if (found := read_json(folder / "alignment.json")) is None:
        return None
    ranges = (f"{task} {c['score'][0]:.2f} to {c['score'][-1]:.2f}" for task, c in found["curves"].items())
    alt = f"Alignment by layer after {key}, from the first to the last: {'; '.join(ranges)}."
    numbers = data_uri("application/json", (folder / "alignment.json").read_bytes())
    return Plot(key, data_uri("image/svg+xml", (folder / "alignment.svg").read_bytes()), alt, numbers)


def loss_files(lines: Lines) -> dict[str, bytes]:
    """Plots and metrics of DVC by file name: the curves of the losses, and where each of them ends."""
    files, last = dict[str, bytes](), dict[str, float]()
    for title in LOSSES:
        name = title.lower().replace(" ", "_")
        if curves := curves_of(lines, title):
            files[f"losses/{name}.csv"] = _table(curves)
        for (variant, of), points in curves.items():
            key = ".".join(filter(None, (variant, name, of.replace("held out: ", "held_out."))))
            last[key] = round(float(_short(points)[-1, 1]), 6)
    return files | {"losses.json": json.dumps(last, indent=1).encode()}


def curves_of(lines: Lines, title: str) -> Curves:
    """The curves of a plot."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    column, by_track = CHARTS[title]
    for variant, start, stage in _started(lines):
        for number, step in enumerate(stage.history, start + 1):
            for name in matching(step, column):
                part = step["track"] if by_track else name.replace(column.rstrip("*"), "depth ") * ("*" in column)
                points.setdefault((variant, part), []).append((number, step[name]))
        for row in stage.validation:
            if column in row:
                place = (start + row["finished_steps"], row[column])
                points.setdefault((variant, f"held out: {row['part']}"), []).append(place)
    return {key: np.array(found) for key, found in points.items()}


def _short(points: np.ndarray) -> np.ndarray:
    """At most MOST_POINTS points, means of neighboring ones."""
    return np.array([part.mean(axis=0) for part in np.array_split(points, min(len(points), MOST_POINTS))])


def _started(lines: Lines) -> Iterator[tuple[str, int, Recorded]]:
    """Every stage with its variant and the steps before it."""
    for variant, stages in lines.items():
        start = 0
        for stage in stages:
            yield variant, start, stage
            start += len(stage.history)


def _table(curves: Curves) -> bytes:
    rows = [[*key, f"{x:g}", f"{y:.6g}"] for key, found in curves.items() for x, y in _short(found)]
    return csv_of([["variant", "of", "step", "value"], *rows])


def _figure(curves: Curves, lines: Lines, groups: Groups) -> Figure:
    """Variants by color, their seeds as thin lines, parts by dashes, stages by marks; tokens above where recorded."""
    variants, parts = (list(dict.fromkeys(names)) for names in zip(*curves, strict=True))
    group_of = {name: group for group, seeds in groups.items() for name in seeds.values()}
    color = {name: f"C{[*groups].index(group)}" for name, group in group_of.items()}
    width = 1.3 if len(groups) == len(lines) else 0.7
    dash = {name: DASHES[number % len(DASHES)] for number, name in enumerate(parts)}
    shown = {group_of[name]: color[name] for name in variants}
    marks: list[tuple[str, Any, str]] = [(ink, "-", group) for group, ink in shown.items()] * (len(shown) > 1)
    marks += [(INK, dash[name], name or "trained on") for name in parts] * (len(parts) > 1)
    columns = 1 if any(len(label) > 30 for *_, label in marks) else 2
    height = 2.9 + 0.16 * -(-len(marks) // columns)
    figure = Figure(figsize=(5.4, height))
    axes = figure.add_axes((0.1, 0.42 / height, 0.88, 2.0 / height))  # a layout engine would draw everything twice
    for (variant, part), found in curves.items():
        axes.plot(*_short(found).T, color=color[variant], linestyle=dash[part], linewidth=width, alpha=0.9)
    for start, name in dict.fromkeys((start, stage.stage) for _, start, stage in _started(lines)):
        axes.axvline(start, color=INK, linewidth=0.6, alpha=0.4)
        axes.text(start, 1.0, f" {name}", transform=axes.get_xaxis_transform(), va="top", fontsize=7)
    axes.set_xlim(0, max(found[-1, 0] for found in curves.values()) + 0.5)
    axes.set_xlabel("step of all stages")
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=False)
    counts = [step.get("tokens", 0.0) for stage in lines[variants[0]] for step in stage.history]
    if all(counts):
        tokens = np.array([0, *np.cumsum(counts)])
        ticks = [tick for tick in MaxNLocator(4).tick_values(0, tokens[-1]) if tick <= tokens[-1]]
        above = axes.secondary_xaxis("top")
        above.set_ticks(np.interp(ticks, tokens, np.arange(len(tokens))).tolist(), [f"{tick:g}" for tick in ticks])
        above.set_xlabel(f"tokens of {variants[0]}" if len(lines) > 1 else "tokens", fontsize=8)
    handles = [Line2D([], [], color=ink, linestyle=style, label=label) for ink, style, label in marks]
    figure.legend(handles=handles, loc="upper left", ncols=columns, handlelength=2.4)
    return figure
