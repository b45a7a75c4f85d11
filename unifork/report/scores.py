"""Benchmarks for the page: scores of all variants side by side, paired differences, first and worst items.

In: what `score` wrote, by variant and benchmark, and the cards. Out: tables. Nothing here knows a benchmark: what is
shown, and on which scale, its card says. Items are the first ones and the worst, never the best.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from unifork.config import EvalCard, Experiment, TextCard
from unifork.config.evals import ShowPart
from unifork.errors import DataError
from unifork.evaluation.comparison import Scores, compare, compare_seeds
from unifork.evaluation.names import SAMPLES
from unifork.evaluation.scoring import VERDICTS, by_split
from unifork.evaluation.statistics import Z95, Score, holm, spread
from unifork.layout import Layout
from unifork.report.band import card_of
from unifork.report.images import stored_images
from unifork.report.reading import Found, last_validation, read_records, scores_by_seed
from unifork.report.tables import Differs, Judged, Measured, Table, count, real, words
from unifork.training.export import TRAINING

SHOWN = 8
"""Items of each kind."""
LONGEST = 300
"""Characters of an expected answer."""


def benchmark(name: str, experiment: Experiment, layout: Layout) -> dict[str, Any]:
    """One benchmark, as all variants did on it."""
    card = card_of(name, experiment, layout)
    found = {group: scores_by_seed(layout, names, name) for group, names in experiment.groups.items()}
    every = [score for seeds in found.values() for scores in seeds.values() for score in scores.values()]
    rules: dict[str, dict[str, str]] = {}
    for score in every:
        rules.setdefault(score.rule, {})[score.name] = words(score.name)
    firsts = {group: names[min(names)] for group, names in experiment.groups.items()}
    folders = {group: layout.scores(variant) / name for group, variant in firsts.items()}
    records = {group: lines for group, folder in folders.items() if (lines := read_records(folder / VERDICTS))}
    if name in experiment.text_evals:
        folders = {group: layout.answers(variant) / name for group, variant in firsts.items()}
    columns, refused = _differences(found, folders)
    return {
        "card": card,
        "missing": [
            variant for group, names in experiment.groups.items() for seed, variant in names.items()
            if not found[group][seed]
        ],
        "seeds": sorted({score.seed for score in every if score.seed is not None}),
        "headlines": _table("Headlines", card, found, card.show.headlines, columns),
        "scores": [
            _table(f"Scores by rule {rule}", card, found, dict(sorted(names.items())), {} if number else columns)
            for number, (rule, names) in enumerate(rules.items())
        ],
        "refused": refused,
        "items": _items(name, {firsts[group]: lines for group, lines in records.items()}, layout) if records else [],
        "numbers": {
            experiment.groups[group][seed]: by_split([*scores.values()])
            for group, seeds in found.items() for seed, scores in seeds.items()
        },
    }  # fmt: skip


def losses(experiment: Experiment, layout: Layout) -> Table:
    """Losses of held-out rows after the last stage of several variants, as a summary."""
    groups = experiment.groups if len(experiment.groups) > 1 else {}
    found = {
        group: {seed: _losses_of(name, experiment, layout) for seed, name in seeds.items()}
        for group, seeds in groups.items()
    }
    names = {name: name for seeds in found.values() for table in seeds.values() for _, name in table}
    return _table("Headlines", None, found, names, _differences(found, {})[0] if found else {})


def _losses_of(variant: str, experiment: Experiment, layout: Layout) -> Scores:
    folder = layout.model(f"{variant}-{experiment.variants[variant].stages[-1]}") / TRAINING
    found = {}
    for row in last_validation(folder / "validation.csv"):
        for loss in ("text_loss", "image_loss"):
            if loss in row:
                name, items = f"held-out {words(loss)} of {row['part']} (lower is better)", int(row["documents"])
                found["all", name] = Score(
                    name, "all", value=row[loss], standard_error=None, interval=None, items=items, clusters=items,
                    chance=nan, rule="", unread=0.0, missing=0, items_hash=row["part"], model=variant, decoding="",
                    seed=None,
                )  # fmt: skip
    return found


def headlines(benchmarks: Sequence[Mapping[str, Any]], losses: Table) -> Table:
    """The summaries of all benchmarks in a single table, whose p are corrected for the number of its differences."""
    tables = [table for table in (*(shown["headlines"] for shown in benchmarks), losses) if table.rows]
    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    named = [dict(zip(table.columns, row, strict=True)) for table in tables for row in table.rows]
    rows = [[row.get(name, "") for name in columns] for row in named]
    corrected = iter(holm([cell.p for row in rows for cell in row if isinstance(cell, Differs)]))
    shown = [[cell._replace(p=next(corrected)) if isinstance(cell, Differs) else cell for cell in row] for row in rows]
    return Table("Headline scores", columns, shown)


def measured(score: Score, card: EvalCard | TextCard | None) -> Measured:
    """A score with its error (or the interval where all items agree), on the scale of its card."""
    error = "?" if score.standard_error is None else real(score.standard_error)
    about = f"({real(score.interval[0])} to {real(score.interval[1])})" if score.interval else f"± {error}"
    text = f"{real(score.value)} {about}" if card else real(score.value)
    text += f"; {count(score.missing)} answers missing" * (score.missing > 0)
    text += f"; {score.note}" * bool(score.note)
    usual = (0.0, 1.0) if max(score.value, score.chance) <= 1 else None
    scales = card.show.scales if card else {"*": None}
    scale = next((ends for pattern, ends in scales.items() if fnmatch(score.name, pattern)), usual)
    if scale is None:
        return Measured(text, None, None)
    worst, best = scale
    places = [min(max((number - worst) / (best - worst), 0.0), 1.0) for number in (score.value, score.chance)]
    return Measured(text, places[0], places[1] if best > worst else None)


def _over_seeds(scores: Sequence[Score], card: EvalCard | TextCard | None) -> Measured | None:
    """A variant's score: of its only run, or the mean over seeds with their standard deviation and the items' error."""
    if len(scores) < 2:
        return measured(scores[0], card) if scores else None
    found, errors = spread([score.value for score in scores]), [score.standard_error for score in scores]
    mean = measured(replace(scores[0], value=found.mean), card)
    low, high = map(real, found.interval)
    text = f"{real(found.mean)} ± {real(found.deviation)} over {found.runs} seeds ({low} to {high})"
    if None not in errors:
        text += f"; items ± {real(fmean(error or 0.0 for error in errors))}"
    return mean._replace(text=text)


def _table(
    label: str,
    card: EvalCard | TextCard | None,
    found: Mapping[str, Mapping[int, Scores]],
    names: Mapping[str, str],
    differences: Mapping[str, Mapping[str, Differs]],
) -> Table:
    """A row for each split and score, in the order of the card, others behind; columns for variants and differences.

    names: scores with their titles. card: None for losses, which have none.
    """
    show = card.show if card else ShowPart()
    every = {key: score for seeds in found.values() for scores in seeds.values() for key, score in scores.items()}
    splits = dict.fromkeys([*show.splits, *sorted(split for split, _ in every)]) or ["all"]
    order = sorted(names, key=lambda name: show.scores.index(name) if name in show.scores else len(names))
    rows = []
    for split in splits:
        for name in order:
            first = every.get((split, name))
            if first or not every:
                key = (split, name)
                cells = [
                    _over_seeds([scores[key] for scores in seeds.values() if key in scores], card)
                    for seeds in found.values()
                ]
                facts = ["" if isnan(first.chance) else real(first.chance), count(first.items)] if first else ["", ""]
                paired = [column.get(f"{split} {name}", "") for column in differences.values()]
                rows.append(
                    [names[name] if split == "all" else f"{words(split)}: {names[name]}", *cells, *facts, *paired]
                )
    return Table(label, ["Score", *found, "Chance", "Items", *differences], rows)


def _differences(
    found: Mapping[str, Mapping[int, Scores]], folders: Mapping[str, Path]
) -> tuple[dict[str, dict[str, Differs]], list[str]]:
    """By title and `split name`: what each variant scores above the first; and why where there is nothing to say.

    Paired by seeds where both have several, else item by item.
    """
    columns, refused = dict[str, dict[str, Differs]](), list[str]()
    first, *others = found
    for other in others:
        title, pair = f"{other} less {first}", (other, first)
        if not all(any(found[variant].values()) for variant in pair):
            continue
        try:
            if all(len(found[variant]) > 1 for variant in pair):
                columns[title] = {
                    " ".join(key): Differs(_between(paired.difference.mean, *paired.difference.interval), paired.p)
                    for key, paired in compare_seeds(found[other], found[first]).items()
                }
            elif folders and all(
                any((folders[variant] / file).exists() for file in (VERDICTS, SAMPLES)) for variant in pair
            ):
                columns[title] = {
                    name: Differs(_between(above, above - Z95 * error, above + Z95 * error), p)
                    for name, _, _, (above, error, p) in compare(folders[other], folders[first])
                }
        except DataError as fault:
            refused.append(f"{title}: {fault}")
    return columns, refused


def _between(value: float, low: float, high: float) -> str:
    return f"{real(value)} ({real(low)} to {real(high)})"


def _items(name: str, records: Mapping[str, Sequence[Found]], layout: Layout) -> list[Table]:
    """The first items of each split, and those that were answered worst, with what each variant made of them."""
    lines = {variant: {line["id"]: line for line in found} for variant, found in records.items()}
    every = {line["id"]: line for found in records.values() for line in found}
    splits: dict[str, list[str]] = {}
    for key, line in every.items():
        splits.setdefault(line["split"], []).append(key)
    first = [key for keys in splits.values() for key in keys[: -(-SHOWN // len(splits))]]
    right = {key: sum(_right(table.get(key)) for table in lines.values()) for key in every}
    wrong = [key for key in every if right[key] < len(lines) and key not in first]
    chosen = {"The first items": first, "The worst of the others": sorted(wrong, key=right.__getitem__)[:SHOWN]}
    shown = [key for keys in chosen.values() for key in keys]
    about = {key: f"the image {every[key]['image']}" for key in shown if every[key]["image"]}
    sources = stored_images(layout.items(name), about, "bytes")
    cells: dict[str, list[list[Any]]] = {
        key: [[*([sources[key]] if key in sources else []), every[key]["question"]], [_expected(every[key])]]
        for key in shown
    }
    for variant, table in lines.items():
        to_draw = [key for key in shown if key not in sources and key in table]
        about = {key: f"{every[key]['question']}, drawn by {variant}" for key in to_draw}
        drawn = stored_images(layout.answers(variant) / name, about, "image")
        for key in shown:
            verdict, own = _verdict(table.get(key)), table.get(key)
            text = own["answer"] if own and key in sources else "; ".join(verdict["faults"] if verdict else ()) or None
            cells[key].append(
                [*([drawn[key]] if key in drawn else []), Judged(verdict["right"] >= 1, text) if verdict else text]
            )
    columns = ["Item", "Expected", *lines]
    return [Table(title, columns, [cells[key] for key in keys]) for title, keys in chosen.items() if keys]


def _verdict(line: Found | None) -> Any:
    """What the first rule says of an answer; None where there is none, or no rule judges it alone."""
    return next(iter(line["verdicts"].values()), None) if line else None


def _right(line: Found | None) -> float:
    return float(verdict["right"]) if (verdict := _verdict(line)) else 1.0


def _expected(line: Found) -> str:
    """The truth of a question in short; of what is to be drawn the question says all."""
    truth = line["truth"] if line["image"] else "an image"
    return (truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False))[:LONGEST]
