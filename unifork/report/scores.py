"""Benchmarks for the page: scores of all variants side by side, paired differences, first and worst items.

In: what `score` wrote, by variant and benchmark, and the cards. Out: tables. Nothing here knows a benchmark: what is
shown, and on which scale, its card says. Items are the first ones and the worst, never the best.
"""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from itertools import combinations
from typing import Any

from unifork.config import EvalCard, Experiment, TextCard, load_eval, load_text
from unifork.errors import DataError
from unifork.evaluation.scoring import METRICS, VERDICTS, by_split, compare
from unifork.evaluation.statistics import Z95, Score
from unifork.layout import Layout
from unifork.report.images import stored_images
from unifork.report.reading import Found, read_records, read_scores
from unifork.report.tables import Judged, Measured, Table, count, real, words

SHOWN = 8
"""Items of each kind."""
LONGEST = 300
"""Characters of an expected answer."""

Card = EvalCard | TextCard
Scores = Mapping[str, Mapping[tuple[str, str], Score]]
"""By variant, and by split and name."""


def benchmark(name: str, experiment: Experiment, layout: Layout) -> dict[str, Any]:
    """One benchmark, as all variants did on it."""
    card = (load_text if name in experiment.text_evals else load_eval)(name, layout.evals)
    entries = [*experiment.evaluations.values(), *experiment.text_runs.values()]
    variants = [entry["variant"] for entry in entries if entry["benchmark"] == name]
    folders = {variant: layout.scores(variant) / name for variant in variants}
    found = {variant: read_scores(folder / METRICS) for variant, folder in folders.items()}
    every = [score for scores in found.values() for score in scores.values()]
    rules: dict[str, dict[str, str]] = {}
    for score in every:
        rules.setdefault(score.rule, {})[score.name] = words(score.name)
    records = {variant: lines for variant in variants if (lines := read_records(folders[variant] / VERDICTS))}
    columns, refused = _differences({variant: folders[variant] for variant in records if found[variant]})
    return {
        "card": card,
        "missing": [variant for variant in variants if not found[variant]],
        "seeds": sorted({score.seed for score in every if score.seed is not None}),
        "headlines": _table("Headlines", card, found, card.show.headlines, {}),
        "scores": [
            _table(f"Scores by rule {rule}", card, found, dict(sorted(names.items())), {} if number else columns)
            for number, (rule, names) in enumerate(rules.items())
        ],
        "refused": refused,
        "items": _items(name, records, layout) if records else [],
        "numbers": {variant: by_split([*scores.values()]) for variant, scores in found.items()},
    }


def measured(score: Score, card: Card) -> Measured:
    """A score with its error (or the interval where all items agree), on the scale of its card."""
    error = "?" if score.standard_error is None else real(score.standard_error)
    about = f"({real(score.interval[0])} to {real(score.interval[1])})" if score.interval else f"± {error}"
    text = f"{real(score.value)} {about}" + f"; {count(score.missing)} answers missing" * (score.missing > 0)
    text += f"; {score.note}" * bool(score.note)
    scale = next((ends for pattern, ends in card.show.scales.items() if fnmatch(score.name, pattern)), None)
    if scale is None and max(score.value, score.chance) > 1:
        return Measured(text, None, None)
    worst, best = scale or (0.0, 1.0)
    places = [min(max((number - worst) / (best - worst), 0.0), 1.0) for number in (score.value, score.chance)]
    return Measured(text, places[0], places[1] if best > worst else None)


def _table(
    label: str, card: Card, found: Scores, names: Mapping[str, str], differences: Mapping[str, Mapping[str, str]]
) -> Table:
    """A row for each split and score, in the order of the card, others behind; columns for variants and differences.

    names: scores with their titles.
    """
    every = {key: score for scores in found.values() for key, score in scores.items()}
    splits = dict.fromkeys([*card.show.splits, *sorted(split for split, _ in every)]) or ["all"]
    order = sorted(names, key=lambda name: card.show.scores.index(name) if name in card.show.scores else len(names))
    rows = []
    for split in splits:
        for name in order:
            first = every.get((split, name))
            if first or not every:
                cells = [(own := scores.get((split, name))) and measured(own, card) for scores in found.values()]
                facts = [real(first.chance), count(first.items)] if first else ["", ""]
                paired = [column.get(f"{split} {name}", "") for column in differences.values()]
                rows.append(
                    [names[name] if split == "all" else f"{words(split)}: {names[name]}", *cells, *facts, *paired]
                )
    return Table(label, ["Score", *found, "Chance", "Items", *differences], rows)


def _differences(folders: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """By pair of variants and `split name`: what the second scores above the first; and why where there is none."""
    columns: dict[str, dict[str, str]] = {}
    refused = []
    for first, second in combinations(folders, 2):
        title = f"{second} less {first}"
        try:
            compared = compare(folders[second], folders[first])
        except DataError as fault:
            refused.append(f"{title}: {fault}")
            continue
        columns[title] = {}
        for name, _, _, (value, error, p) in compared:
            low, high = value - Z95 * error, value + Z95 * error
            columns[title][name] = f"{real(value)} ({real(low)} to {real(high)}), p {p:.2g}"
    return columns, refused


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
