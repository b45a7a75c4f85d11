"""Benchmarks for the page: scores of all variants side by side, paired differences, first and worst items.

In: what `score` wrote, by variant and benchmark, and the cards. Out: tables. Nothing here knows a benchmark: what is
shown, and on which scale, its card says. Items are the first ones and the worst, never the best.
"""

import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from itertools import combinations
from typing import Any

from unifork.config import EvalCard, Experiment, load_eval
from unifork.errors import DataError
from unifork.evaluation.scoring import METRICS, VERDICTS, by_split, compare
from unifork.evaluation.statistics import Z95, Score
from unifork.images import open_image
from unifork.layout import Layout
from unifork.report.images import shown_image, stored_images
from unifork.report.reading import Found, read_records, read_scores
from unifork.report.tables import Judged, Measured, Table, count, real, words

SHOWN = 8
"""Items of each kind."""
LONGEST = 300
"""Characters of an expected answer that is no text."""

Scores = dict[str, dict[str, Score]]
"""By split and name."""


def benchmark(name: str, experiment: Experiment, layout: Layout) -> dict[str, Any]:
    """One benchmark, as all variants did on it; tables are None where nothing was scored."""
    card = load_eval(name, layout.evals)
    variants = [entry["variant"] for entry in experiment.evaluations.values() if entry["benchmark"] == name]
    found = {variant: read_scores(layout.scores(variant) / name / METRICS) for variant in variants}
    every = [score for scores in found.values() for table in scores.values() for score in table.values()]
    records = {
        variant: lines for variant in variants if (lines := read_records(layout.scores(variant) / name / VERDICTS))
    }
    differences, refused = _differences([variant for variant in variants if found[variant]], name, layout)
    return {
        "name": name,
        "card": card,
        "missing": [variant for variant in variants if not found[variant]],
        "seeds": sorted({score.seed for score in every if score.seed is not None}),
        "scores": {rule: _table(card, found, rule, differences) for rule in dict.fromkeys(one.rule for one in every)},
        "refused": refused,
        "headlines": _headlines(card, found),
        "items": _items(name, records, layout) if records else {},
        "numbers": {
            variant: by_split([score for table in scores.values() for score in table.values()])
            for variant, scores in found.items()
        },
    }


def measured(score: Score, card: EvalCard) -> Measured:
    """A score with its error (or the interval where all items agree), on the scale of its card."""
    error = "?" if score.standard_error is None else real(score.standard_error)
    text = f"{real(score.value)} ± {error}"
    if score.interval:
        text = f"{real(score.value)} ({real(score.interval[0])} to {real(score.interval[1])})"
    if score.missing:
        text += f" of a part: {count(score.missing)} answers missing"
    scale = next((ends for pattern, ends in card.show.scales.items() if fnmatch(score.name, pattern)), None)
    if scale is None and max(score.value, score.chance) > 1:
        return Measured(text, None, None)
    worst, best = scale or (0.0, 1.0)
    places = [min(max((number - worst) / (best - worst), 0.0), 1.0) for number in (score.value, score.chance)]
    return Measured(text, *places)


def _headlines(card: EvalCard, found: dict[str, Scores]) -> list[dict[str, Any]]:
    """The scores of a summary: a title, and for each split and variant the score, None where there is none."""
    splits = card.show.splits or _ordered({split for scores in found.values() for split in scores}, ()) or ["all"]
    lines = {
        name: [
            (words(split), variant, score, score and measured(score, card))
            for split in splits
            for variant, scores in found.items()
            if (score := scores.get(split, {}).get(name)) or not scores
        ]
        for name in card.show.headlines
    }
    return [{"title": title, "lines": lines[name]} for name, title in card.show.headlines.items()]


def _table(card: EvalCard, found: dict[str, Scores], rule: str, differences: dict[str, dict[str, str]]) -> Table:
    """A row for each score of a rule, split by split; columns for variants, and for their differences by that rule."""
    differences = differences if rule == card.score.rules[0] else {}
    rows = []
    first = {
        (split, name): score
        for scores in reversed(found.values())
        for split, table in scores.items()
        for name, score in table.items()
        if score.rule == rule
    }
    for split in _ordered({split for split, _ in first}, card.show.splits):
        for name in _ordered({name for place, name in first if place == split}, card.show.scores):
            scores = [table.get(split, {}).get(name) for table in found.values()]
            cells = [score and measured(score, card) for score in scores]
            paired = [column.get(f"{split} {name}", "") for column in differences.values()]
            title = words(name) if split == "all" else f"{words(split)}: {words(name)}"
            chance, items = first[split, name].chance, first[split, name].items
            rows.append([title, *cells, real(chance), count(items), *paired])
    return Table(f"Scores of {card.name} by rule {rule}", ["Score", *found, "Chance", "Items", *differences], rows)


def _differences(variants: Sequence[str], name: str, layout: Layout) -> tuple[dict[str, dict[str, str]], list[str]]:
    """By pair of variants and `split name`: what the second scores above the first; and why where there is none."""
    columns: dict[str, dict[str, str]] = {}
    refused = []
    for first, second in combinations(variants, 2):
        try:
            compared = compare(layout.scores(second) / name, layout.scores(first) / name)
        except DataError as error:
            refused.append(f"{second} less {first}: {error}")
            continue
        columns[f"{second} less {first}"] = {
            score: f"{real(d.value)} ({real(d.value - Z95 * d.standard_error)} to "
            f"{real(d.value + Z95 * d.standard_error)}), p {d.p:.2g}"
            for score, _, _, d in compared
        }
    return columns, refused


def _items(name: str, records: dict[str, list[Found]], layout: Layout) -> dict[str, Table]:
    """The first items of each split, and those that were answered worst, with what each variant made of them."""
    lines = {variant: {line["id"]: line for line in found} for variant, found in records.items()}
    every = {line["id"]: line for found in records.values() for line in found}
    right = {key: [_verdict(table[key])["right"] for table in lines.values() if key in table] for key in every}
    by_split: dict[str, list[str]] = {}
    for key, line in every.items():
        by_split.setdefault(line["split"], []).append(key)
    share = -(-SHOWN // len(by_split))
    chosen = {"The first items": [key for keys in by_split.values() for key in keys[:share]]}
    wrong = [key for key in every if sum(right[key]) < len(right[key]) and key not in chosen["The first items"]]
    chosen["The worst of the others"] = sorted(wrong, key=lambda key: sum(right[key]) / len(right[key]))[:SHOWN]
    wanted = {key for keys in chosen.values() for key in keys}
    asked = stored_images(layout.items(name), [key for key in wanted if every[key]["image"]], "bytes")
    drawn = {
        variant: stored_images(
            layout.answers(variant) / name, [k for k in wanted & {*table} if not table[k]["image"]], "image"
        )
        for variant, table in lines.items()
    }

    def given(variant: str, key: str) -> list[Any] | str:
        line = lines[variant].get(key)
        if line is None:
            return ""
        verdict = _verdict(line)
        good = verdict["right"] >= 1
        text = line["answer"] if line["image"] else "; ".join(verdict["faults"])
        text = text or ("(nothing)" if line["image"] else "as wanted" if good else "wrong")
        if key not in drawn[variant]:
            return [Judged(good, text)]
        alt = f"{line['question']}, drawn by {variant}"
        return [shown_image(open_image(drawn[variant][key]), alt), Judged(good, text)]

    def row(key: str) -> list[Any]:
        line = every[key]
        image = [shown_image(open_image(asked[key]), f"the image {line['image']}")] if key in asked else []
        expected = _expected(line["truth"]) if line["image"] else "an image"  # what is wrong with it a verdict says
        return [[*image, line["question"]], expected, *(given(variant, key) for variant in lines)]

    columns = ["Item", "Expected", *lines]
    return {
        title: Table(f"{title} of {name}", columns, [row(key) for key in keys])
        for title, keys in chosen.items()
        if keys
    }


def _verdict(line: Found) -> Any:
    """What the first rule says of an answer."""
    return next(iter(line["verdicts"].values()), {"right": 0.0, "faults": ["no public truth"]})


def _expected(truth: Any) -> str:
    text = truth if isinstance(truth, str) else "" if truth is None else json.dumps(truth, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _ordered(found: Iterable[str], first: Sequence[str]) -> list[str]:
    """Names in a given order, others behind them by name."""
    return [*(name for name in first if name in found), *sorted({*found} - {*first})]
