"""Every table and figure of a study, from its records alone.

In: `Results`. Out: tables and charts, for the report of an experiment too; and a folder with `tables.md`, `scores.csv`,
an SVG for each chart, and `index.html`, which needs no other file. Equal records give equal bytes.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unifork.evaluation.statistics import Spread, spread
from unifork.figures import INK, LOOK, svg
from unifork.report.plots import DASHES, Plot
from unifork.report.study import Between, Results, family, judged
from unifork.report.tables import Judged, Table, count, data_uri, duration, words
from unifork.shards.manifest import write_atomically

COLUMNS, WIDTH = 4, 2.3
"""Panels of a row of a chart, and inches of each."""
GRID = "grid.png"
MARKS = {"holds": True, "contradicted": False}
"""Verdicts that are right or wrong; the others are neither."""


class Chart(NamedTuple):
    """A figure, and the numbers that it shows."""

    file: str
    title: str
    svg: str
    alt: str
    rows: Sequence[Sequence[Any]]
    """First the names of the columns."""

    @property
    def plot(self) -> Plot:
        """As pages show it."""
        src = data_uri("image/svg+xml", self.svg.encode())
        return Plot(self.title, src, self.alt, data_uri("text/csv", table_csv(self.rows)))


Panels = dict[str, dict[str, dict[int, list[float]]]]
"""By panel, variant and layer: the values of all seeds."""


def score_groups(results: Results) -> dict[str, list[str]]:
    """The quantities of the tables: scores by `<benchmark> <split>`, losses by `loss <stage>`."""
    scores = dict.fromkeys(name for record in results.records for name in record.scores)
    names = [*scores, *(name for name in results.names if name.startswith("loss "))]
    ordered = sorted(names, key=_group)
    return {group: list(members) for group, members in groupby(ordered, _group)}


def _group(name: str) -> str:
    return " ".join(name.split(" ")[:2])


def _spread(results: Results, variant: str, name: str) -> Spread | None:
    values = [*results.of(variant, (name,)).values()]
    return spread(values) if values else None


def _mean(found: Spread | None) -> str | None:
    """Mean, standard deviation over seeds, and the 95 % interval of the mean."""
    if found is None:
        return None
    if found.runs == 1:
        return f"{found.mean:.4g}"
    low, high = found.interval
    return f"{found.mean:.3g} ± {found.deviation:.2g} ({low:.3g} to {high:.3g})"


def means(results: Results, label: str, names: Sequence[str], titles: Sequence[str] = ()) -> Table:
    """A row for each variant, a column for each quantity. titles: of the columns, where they are not the last words."""
    columns = titles or [words(name.removeprefix(f"{_group(name)} ")) for name in names]
    rows = [[variant, *(_mean(_spread(results, variant, name)) for name in names)] for variant in results.values]
    return Table(label, ["Variant", *columns], rows)


def runs_table(results: Results) -> Table:
    """What every variant is and how many runs of it are recorded."""
    rows = []
    for variant in results.study.variants:
        own = [record for record in results.records if record.variant == variant.name]
        seeds = ", ".join(str(record.seed) for record in own) or None
        facts = [count(own[0].parameters), duration(fmean(sum(r.seconds.values()) for r in own))] if own else [None] * 2
        rows.append([variant.name, variant.plan, *facts, seeds])
    return Table("Runs", ["Variant", "Layer plan", "Parameters", "Training, mean", "Seeds"], rows)


def hypotheses_table(results: Results) -> Table:
    """A row for each hypothesis."""
    rows = []
    for each, row, verdict in judged(results):
        mark = Judged(MARKS[verdict], verdict) if verdict in MARKS else verdict
        compared = f"{each.first} {each.sign} {each.second} in {', '.join(each.quantities)}"
        rows.append([each.id, each.says, compared, each.family, *_between(row), mark])
    return Table("Hypotheses", ["", "Hypothesis", "Compared", "Family", *BETWEEN, "Verdict"], rows)


BETWEEN = ("Seeds", "Difference", "95 % interval", "Interval of the family", "p", "p of the family")


def _between(row: Between) -> list[str | None]:
    if row.found is None:
        return [str(row.runs), *[None] * 5]
    intervals = ("{:.3g} to {:.3g}".format(*ends) for ends in (row.found.difference.interval, row.wide))
    return [str(row.runs), f"{row.found.difference.mean:.3g}", *intervals, f"{row.found.p:.2g}", f"{row.corrected:.2g}"]


def differences(results: Results, reference: str) -> Table:
    """All variants less a reference in all scores and losses; the variants in one score are a family."""
    others, rows = [name for name in results.values if name != reference], list[list[Any]]()
    for names in score_groups(results).values() if others else ():
        for name in names:
            found = family(results, [(other, reference, (name,)) for other in others])
            rows += [[words(name), row.first, *_between(row)] for row in found if row.runs]
    title = f"Differences from {reference} (families of {len(others)}, the variants in one score)"
    return Table(title, ["Score", "Variant", *BETWEEN], rows)


def tables(results: Results) -> list[Table]:
    """All of them, in order."""
    found = [runs_table(results)] + [hypotheses_table(results)] * bool(results.hypotheses)
    found += [means(results, words(group), names) for group, names in score_groups(results).items()]
    return found + [differences(results, reference) for reference in results.references]


def charts(results: Results) -> list[Chart]:
    """All of them, in order."""
    found = [dots(results, group, names) for group, names in score_groups(results).items()]
    return found + curves(results)


def _panels(number: int, height: float) -> tuple[Figure, list[Axes]]:
    rows, columns = -(-number // COLUMNS), min(number, COLUMNS)
    figure = Figure(figsize=(WIDTH * columns + 0.8, height * rows + 0.5), layout="constrained")
    axes = [*figure.subplots(rows, columns, squeeze=False, sharey=True).flat]
    for empty in axes[number:]:
        empty.set_visible(False)
    return figure, axes[:number]


def _look(number: int) -> dict[str, Any]:
    """Of a variant: there are eight colors."""
    return {"color": f"C{number % 8}", "linestyle": DASHES[number // 8 % len(DASHES)]}


@matplotlib.rc_context(fname=LOOK)
def dots(results: Results, group: str, names: Sequence[str]) -> Chart:
    """Means with their 95 % intervals over seeds, and a faint dot for each seed; a panel for each score."""
    variants = [*results.values]
    chance = {name: score.chance for record in results.records for name, score in record.scores.items()}
    figure, panels = _panels(len(names), 0.18 * len(variants) + 0.55)
    rows: list[Sequence[Any]] = [("variant", "of", "seeds", "mean", "low", "high")]
    for axes, name in zip(panels, names, strict=True):
        for place, variant in enumerate(variants):
            values, look = [*results.of(variant, (name,)).values()], _look(place)
            if not values:
                continue
            found = spread(values)
            reach = found.interval[1] - found.mean if found.runs > 1 else None
            axes.plot(values, [place] * len(values), ".", color=look["color"], alpha=0.35, markersize=4)
            axes.errorbar(found.mean, place, xerr=reach, fmt="o", color=look["color"], markersize=4, capsize=2)
            rows.append((variant, name, found.runs, *(f"{x:.6g}" for x in (found.mean, *found.interval))))
        if name in chance:
            axes.axvline(chance[name], color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        axes.set_title(words(name.removeprefix(f"{group} ")), fontsize=8)
        axes.set_yticks(range(len(variants)), variants)
    panels[0].set_ylim(len(variants) - 0.5, -0.5)
    alt = "; ".join(f"{row[0]} {row[1].removeprefix(group).strip()} {row[3]}" for row in rows[1:])
    return Chart(f"{group.replace(' ', '-')}.svg", words(group), svg(figure), f"{words(group)}. {alt}", rows)


def curves(results: Results) -> list[Chart]:
    """Alignment and conflict by layer, the variants over each other: means over seeds with their standard errors."""
    found: dict[str, Panels] = {"alignment": {}, "conflict": {}}
    for variant, runs in results.values.items():
        for values in runs.values():
            for name, value in values.items():
                kind, *of, layer = name.split(" ")
                if kind in found and layer.isdecimal():
                    panel = found[kind].setdefault(" ".join(of), {})
                    panel.setdefault(variant, {}).setdefault(int(layer), []).append(value)
    return [_curves(results, kind, panels) for kind, panels in found.items() if panels]


@matplotlib.rc_context(fname=LOOK)
def _curves(results: Results, kind: str, panels: Panels) -> Chart:
    """A panel for each stage and task, or stage and matrix; chance is shaded, forks are dotted lines."""
    order = {variant.name: number for number, variant in enumerate(results.study.variants)}
    forks = {variant.name: variant.fork for variant in results.study.variants}
    figure, places = _panels(len(panels), 2.0)
    rows: list[Sequence[Any]] = [("variant", "of", "layer", "seeds", "mean", "error")]
    shown: dict[str, Any] = {}
    for axes, (title, of_variants) in zip(places, panels.items(), strict=True):
        if kind == "alignment" and (ends := _chance(results, title)):
            axes.fill_between(range(len(ends[0])), *ends, color="0.5", alpha=0.2, linewidth=0)
        for variant, layers in of_variants.items():
            spreads = {layer: spread(values) for layer, values in sorted(layers.items())}
            means_L = np.array([each.mean for each in spreads.values()])
            errors_L = np.array([each.deviation / each.runs**0.5 for each in spreads.values()])
            look, x = _look(order[variant]), [*spreads]
            shown[variant], *_ = axes.plot(x, means_L, **look)
            axes.fill_between(x, means_L - errors_L, means_L + errors_L, color=look["color"], alpha=0.2, linewidth=0)
            if forks[variant] is not None:
                axes.axvline(forks[variant] or 0, color=look["color"], linestyle=":", linewidth=0.7)
            rows += [
                (variant, title, layer, each.runs, f"{each.mean:.6g}", f"{error:.6g}")
                for (layer, each), error in zip(spreads.items(), errors_L, strict=True)
            ]
        axes.set_title(words(title), fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("layer", fontsize=8)
    names = sorted(shown, key=order.__getitem__)
    figure.legend([shown[name] for name in names], names, loc="outside upper center", ncols=min(5, len(names)))
    alt = f"{kind.title()} by layer of {', '.join(names)}: {', '.join(map(words, panels))}."
    return Chart(f"{kind}.svg", f"{kind.title()} by layer", svg(figure), alt, rows)


def _chance(results: Results, panel: str) -> tuple[Sequence[float], Sequence[float]] | None:
    """The lowest and the highest of the central 95 % of chance, over all runs, by layer."""
    stage, task = panel.split(" ")
    found = [record.alignment[stage][task] for record in results.records if task in record.alignment.get(stage, {})]
    if len({len(curve.low) for curve in found}) != 1:  # models of other depths
        return None
    lows, highs = ([*zip(*columns, strict=True)] for columns in zip(*((c.low, c.high) for c in found), strict=True))
    return [*map(min, lows)], [*map(max, highs)]


def table_csv(rows: Sequence[Sequence[Any]]) -> bytes:
    """Rows as CSV."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue().encode()


def markdown(table: Table) -> str:
    """A table as Markdown, below its title."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join([f"## {table.label}", "", *("| " + " | ".join(map(_plain, line)) + " |" for line in lines), ""])


def _plain(cell: Any) -> str:
    text = "-" if cell is None else cell.text if isinstance(cell, Judged) else cell
    return str(text).replace("|", "\\|").replace("\n", " ")


def _scores(results: Results) -> Iterator[Sequence[Any]]:
    yield "variant", "seed", "quantity", "value", "error"
    for record in results.records:
        for name, score in record.scores.items():
            yield record.variant, record.seed, name, score.value, "" if score.error is None else score.error
        for name, loss in record.losses.items():
            yield record.variant, record.seed, f"loss {name}", loss, ""


def write(results: Results, folder: Path, out: Path) -> list[Path]:
    """Write all files of a study; their paths."""
    shown, drawn, image = tables(results), charts(results), folder / GRID
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("study.html").render(
        study=results.study, tables=shown, plots=[chart.plot for chart in drawn],
        grid=data_uri("image/png", image.read_bytes()) if image.exists() else None,
    )  # fmt: skip
    files = {chart.file: chart.svg.encode() for chart in drawn} | {"index.html": page.encode()}
    files |= {"tables.md": "\n".join([f"# {results.study.name}", "", *map(markdown, shown)]).encode()}
    files |= {"scores.csv": table_csv([*_scores(results)])}
    for name, data in files.items():
        write_atomically(out / name, partial(Path.write_bytes, data=data))
    return [out / name for name in files]
