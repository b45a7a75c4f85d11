"""Every table and figure of a study, from its records alone.

In: `Results`. Out: tables and plots, for the report of an experiment too; and a folder with `tables.md`, `scores.csv`,
an SVG for each plot, and `index.html`, which needs no other file. Equal records give equal bytes.
"""

from base64 import b64decode
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unifork.config import EvalCard, TextCard
from unifork.evaluation.statistics import spread
from unifork.figures import INK, LOOK
from unifork.report.plots import DASHES, Plot, plot
from unifork.report.study import Between, Record, Results, curves_of, family, judged
from unifork.report.tables import Judged, Table, count, csv_of, data_uri, duration, rendered, table, words
from unifork.shards.manifest import write_atomically

COLUMNS, WIDTH, COLORS = 4, 2.3, 8
"""Panels of a row of a plot, inches of each, and colors before lines are broken."""
GRID = "grid.png"
MARKS = {"holds": True, "contradicted": False}
"""Verdicts that are right or wrong; the others are neither."""
BETWEEN = ("Seeds", "Difference", "95 % interval", "Interval of the family", "p", "p of the family")
OfRun = tuple[Record, Mapping[int, float]]
"""A run, and what it has of a panel by layer."""


def score_groups(results: Results) -> dict[str, list[str]]:
    """The quantities of the tables: scores by `<benchmark> <split>`, losses by `loss <stage>`."""
    found: dict[str, list[str]] = {}
    losses = [name for name in results.names if name.startswith("loss ")]
    for name in dict.fromkeys([*(name for record in results.records for name in record.scores), *losses]):
        found.setdefault(" ".join(name.split(" ")[:2]), []).append(name)
    return found


def means(results: Results, label: str, names: Mapping[str, Sequence[str]]) -> Table:
    """A row for each variant, a column for the mean of some quantities. names: of these, by title."""
    return table(label, [
        {"Variant": variant} | {title: _mean([*results.of(variant, each).values()]) for title, each in names.items()}
        for variant in results.values
    ])  # fmt: skip


def _mean(values: Sequence[float]) -> str | None:
    """Mean, standard deviation over seeds, and the 95 % interval of the mean."""
    if len(values) < 2:
        return f"{values[0]:.3g}" if values else None
    found = spread(values)
    return "{:.3g} ± {:.2g} ({:.3g} to {:.3g})".format(found.mean, found.deviation, *found.interval)


def tables(results: Results) -> list[Table]:
    """All of them, in order: what was asked and found, then everything that was measured."""
    found = hypotheses_tables(results)
    if names := dict.fromkeys(each.score for each in results.hypotheses):
        found.append(means(results, "What the hypotheses compare", {title_of(each): each for each in names}))
    found.append(runs_table(results))
    for group, members in score_groups(results).items():
        found.append(means(results, words(group), {words(name.removeprefix(f"{group} ")): (name,) for name in members}))
    return found + [differences(results, reference) for reference in results.references]


def title_of(names: Sequence[str]) -> str:
    """Words for the mean of some quantities."""
    parts = zip(*(name.split(" ") for name in names), strict=False)
    common = words(" ".join(part for part, *others in parts if {*others} <= {part}))
    return common if len(names) == 1 else f"{common} (mean of {len(names)})"


def verdicts(results: Results) -> str:
    """How many hypotheses hold and do not; empty without any."""
    found = Counter(verdict for *_, verdict in judged(results))
    return ", ".join(f"{number} {verdict}" for verdict, number in found.most_common())


def architectures(results: Results, cards: Mapping[str, EvalCard | TextCard]) -> Table:
    """A row for each variant, a column for each headline of the benchmarks. cards: by name."""
    scores = dict.fromkeys(tuple(name.split(" ", 2)) for record in results.records for name in record.scores)
    names = {
        f"{words(split)}: {cards[of].show.headlines[score]}": (f"{of} {split} {score}",)
        for of, split, score in sorted(scores, key=lambda name: name[1] not in cards[name[0]].show.splits[:1])
        if score in cards[of].show.headlines
    }
    return means(results, "Architectures", names)


def runs_table(results: Results) -> Table:
    """What every variant is and which runs of it are recorded."""
    rows = []
    for variant in results.study.variants:
        own = [record for record in results.records if record.variant == variant.name]
        facts: list[Any] = [None] * 3
        if own:
            seconds = fmean(sum(record.seconds.values()) for record in own)
            facts = [count(own[0].parameters), duration(seconds), ", ".join(str(record.seed) for record in own)]
        rows.append([variant.name, variant.plan, *facts])
    return Table("Runs", ["Variant", "Layer plan", "Parameters", "Training, mean", "Seeds"], rows)


def hypotheses_tables(results: Results) -> list[Table]:
    """A table for each family of hypotheses, with a row for each of them."""
    families: dict[str, list[list[Any]]] = {}
    for each, row, verdict in judged(results):
        mark = Judged(MARKS[verdict], verdict) if verdict in MARKS else verdict
        compared = f"{each.first} {each.sign} {each.second}: {title_of(each.score)}"
        families.setdefault(each.family, []).append([each.id, each.says, mark, compared, *_between(row)])
    columns = ["", "Hypothesis", "Verdict", "Compared", *BETWEEN]
    return [Table(f"Hypotheses: {name}", columns, rows) for name, rows in families.items()]


def differences(results: Results, reference: str) -> Table:
    """All variants less a reference in all scores and losses; the variants in one score are a family."""
    others, rows = [name for name in results.values if name != reference], list[list[Any]]()
    for name in (name for names in score_groups(results).values() for name in names):
        found = family(results, [(other, reference, (name,)) for other in others])
        rows += [[words(name), row.first, *_between(row)] for row in found if row.runs]
    title = f"Differences from {reference} (families of {len(others)}, the variants in one score)"
    return Table(title, ["Score", "Variant", *BETWEEN], rows)


def _between(row: Between) -> list[str | None]:
    if row.found is None:
        return [str(row.runs), *[None] * 5]
    above, intervals = row.found.difference, (row.found.difference.interval, row.wide)
    texts = ("{:.3g} to {:.3g}".format(*ends) for ends in intervals)
    return [str(row.runs), f"{above.mean:.3g}", *texts, f"{row.found.p:.2g}", f"{row.corrected:.2g}"]


def plots(results: Results) -> list[Plot]:
    """All of them, in order."""
    return [dots(results, group, names) for group, names in score_groups(results).items()] + curves(results)


def _panels(number: int, height: float) -> tuple[Figure, list[Axes]]:
    rows, columns = -(-number // COLUMNS), min(number, COLUMNS)
    figure = Figure(figsize=(WIDTH * columns + 0.8, height * rows + 0.5), layout="constrained")
    axes = [*figure.subplots(rows, columns, squeeze=False, sharey=True).flat]
    for empty in axes[number:]:
        empty.set_visible(False)
    return figure, axes[:number]


def _plot(title: str, figure: Figure, rows: Sequence[Sequence[Any]]) -> Plot:
    """rows: the numbers, below the names of their columns."""
    return plot(title, figure, f"{title}: " + "; ".join(" ".join(map(str, row)) for row in rows[1:]), rows)


@matplotlib.rc_context(fname=LOOK)
def dots(results: Results, group: str, names: Sequence[str]) -> Plot:
    """Means with their 95 % intervals over seeds, and a faint dot for each seed; a panel for each score."""
    chance = {name: score.chance for record in results.records for name, score in record.scores.items()}
    figure, panels = _panels(len(names), 0.18 * len(results.values) + 0.55)
    rows: list[Sequence[Any]] = [("variant", "score", "seeds", "mean", "low", "high")]
    for axes, name in zip(panels, names, strict=True):
        for place, variant in enumerate(results.values):
            if values := [*results.of(variant, (name,)).values()]:
                found, color = spread(values), f"C{place % COLORS}"
                reach = found.interval[1] - found.mean if found.runs > 1 else None
                axes.plot(values, [place] * len(values), ".", color=color, alpha=0.35, markersize=4)
                axes.errorbar(found.mean, place, xerr=reach, fmt="o", color=color, markersize=4, capsize=2)
                rows.append((variant, name, found.runs, *(f"{x:.4g}" for x in (found.mean, *found.interval))))
        if name in chance:
            axes.axvline(chance[name], color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        axes.set_title(words(name.removeprefix(f"{group} ")), fontsize=8)
        axes.set_yticks(range(len(results.values)), [*results.values])
    panels[0].set_ylim(len(results.values) - 0.5, -0.5)
    return _plot(words(group), figure, rows)


@matplotlib.rc_context(fname=LOOK)
def curves(results: Results) -> list[Plot]:
    """Alignment and conflict by layer, the variants over each other: means over seeds with their standard errors.

    A panel for each stage and task, or stage and matrix; chance of the first run is shaded, forks are dotted lines.
    """
    found: dict[str, dict[str, list[OfRun]]] = {}
    for record in results.records:
        for kind, curves in curves_of(record).items():
            for of, layers in curves.items():
                found.setdefault(kind, {}).setdefault(of, []).append((record, layers))
    return [_curves(results, kind, panels) for kind, panels in found.items()]


def _curves(results: Results, kind: str, panels: Mapping[str, Sequence[OfRun]]) -> Plot:
    figure, places = _panels(len(panels), 2.0)
    rows: list[Sequence[Any]] = [("variant", "of", "layer", "seeds", "mean", "error")]
    shown: dict[str, Any] = {}
    for axes, (of, runs) in zip(places, panels.items(), strict=True):
        if kind == "alignment":
            stage, task = of.split(" ")
            chance = runs[0][0].alignment[stage][task]
            ends = (chance.chance_low, chance.chance_high)
            axes.fill_between([*runs[0][1]], *ends, color="0.5", alpha=0.2, linewidth=0)
        for number, variant in enumerate(results.study.variants):
            own = [layers for run, layers in runs if run.variant == variant.name]
            if not own:
                continue
            look = {"marker": ".", "color": f"C{number % COLORS}", "linestyle": DASHES[number // COLORS % len(DASHES)]}
            x, spreads = [*own[0]], [spread([layers[layer] for layers in own]) for layer in own[0]]
            means_L = np.array([each.mean for each in spreads])
            errors_L = np.array([each.deviation / each.runs**0.5 for each in spreads])
            shown[variant.name], *_ = axes.plot(x, means_L, **look)
            axes.fill_between(x, means_L - errors_L, means_L + errors_L, color=look["color"], alpha=0.2, linewidth=0)
            if variant.fork is not None:
                axes.axvline(variant.fork, color=look["color"], linestyle=":", linewidth=0.7)
            numbers = zip(x, means_L, errors_L, strict=True)
            rows += [(variant.name, of, layer, len(own), f"{m:.4g}", f"{e:.4g}") for layer, m, e in numbers]
        axes.set_title(words(of), fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("layer", fontsize=8)
    figure.legend([*shown.values()], [*shown], loc="outside upper center", ncols=min(5, len(shown)))
    return _plot(f"{kind} by layer", figure, rows)


def write(results: Results, folder: Path, out: Path) -> list[Path]:
    """Write all files of a study; their paths."""
    all_plots, image = plots(results), folder / GRID
    shown = {"study": results.study, "verdicts": verdicts(results), "tables": tables(results), "plots": all_plots}
    shown["grid"] = data_uri("image/png", image.read_bytes()) if image.exists() else None
    scores: list[Sequence[Any]] = [("variant", "seed", "quantity", "value", "error")]
    for record in results.records:
        scores += [(record.variant, record.seed, name, row.value, row.error) for name, row in record.scores.items()]
        scores += [(record.variant, record.seed, f"loss {name}", loss, None) for name, loss in record.losses.items()]
    pages = {"index.html": "study.html", "tables.md": "study.md.jinja"}
    files = {name: rendered(template, **shown).encode() for name, template in pages.items()}
    files["scores.csv"] = csv_of(scores)
    files |= {f"{plot.title.replace(' ', '-')}.svg": b64decode(plot.src.partition(",")[2]) for plot in all_plots}
    for name, data in files.items():
        write_atomically(out / name, partial(Path.write_bytes, data=data))
    return [out / name for name in files]
