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
from unifork.evaluation.scoring import VERDICTS, JudgedItem, by_split
from unifork.evaluation.statistics import Z95, Score, holm, spread
from unifork.layout import Layout
from unifork.report.band import card_of
from unifork.report.images import ShownImage, stored_images
from unifork.report.reading import last_validation, read_lines, scores_by_seed
from unifork.report.tables import Differs, Judged, Measured, Table, count, real, table, words
from unifork.training.export import TRAINING

SHOWN = 8
"""Items of each kind."""
LONGEST = 300
"""Characters of an expected answer."""
Card = EvalCard | TextCard | None
"""None for losses, which have none."""
Found = Mapping[str, Mapping[int, Scores]]
"""Scores of variants, by group and training seed."""
Differences = Mapping[str, Mapping[str, Differs]]
"""What variants score above the first, by title and `split name`."""
Row = dict[str, Any]
"""Cells by the titles of their columns."""


def benchmark(name: str, experiment: Experiment, layout: Layout) -> dict[str, Any]:
    """One benchmark, as all variants did on it."""
    card = card_of(name, experiment, layout)
    found = {group: scores_by_seed(layout, names, name) for group, names in experiment.groups.items()}
    runs = {experiment.groups[group][seed]: scores for group, seeds in found.items() for seed, scores in seeds.items()}
    every = [score for scores in runs.values() for score in scores.values()]
    rules: dict[str, dict[str, str]] = {}
    for score in every:
        rules.setdefault(score.rule, {})[score.name] = words(score.name)
    kept = layout.answers if name in experiment.text_evals else layout.scores
    columns, refused = _differences(found, {group: kept(first) / name for group, first in experiment.firsts.items()})
    answered = {
        first: {line["id"]: line for line in lines}
        for first in experiment.firsts.values()
        if (lines := read_lines(layout.scores(first) / name / VERDICTS, JudgedItem))
    }
    return {
        "card": card,
        "missing": [variant for variant, scores in runs.items() if not scores],
        "seeds": sorted({score.seed for score in every if score.seed is not None}),
        "headlines": _rows(card, found, card.show.headlines, columns),
        "scores": [
            table(f"Scores by rule {rule}", _rows(card, found, dict(sorted(names.items())), {} if number else columns))
            for number, (rule, names) in enumerate(rules.items())
        ],
        "refused": refused,
        "items": _items(name, answered, layout),
        "numbers": {variant: by_split([*scores.values()]) for variant, scores in runs.items()},
    }


def losses(experiment: Experiment, layout: Layout) -> list[Row]:
    """Losses of held-out rows after the last stage of several variants, as a summary."""
    groups = experiment.groups if len(experiment.groups) > 1 else {}
    found = {
        group: {seed: _losses_of(name, experiment, layout) for seed, name in seeds.items()}
        for group, seeds in groups.items()
    }
    names = {name: name for seeds in found.values() for scores in seeds.values() for _, name in scores}
    return _rows(None, found, names, _differences(found, {})[0]) if names else []


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


def headlines(rows: Sequence[Row]) -> Table:
    """A single table of summaries, whose p are corrected for the number of its differences."""
    corrected = iter(holm([cell.p for row in rows for cell in row.values() if isinstance(cell, Differs)]))
    shown = [
        {title: cell._replace(p=next(corrected)) if isinstance(cell, Differs) else cell for title, cell in row.items()}
        for row in rows
    ]
    return table("Headline scores", shown)


def measured(score: Score, card: Card) -> Measured:
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


def _over_seeds(scores: Sequence[Score], card: Card) -> Measured | None:
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


def _rows(card: Card, found: Found, names: Mapping[str, str], differences: Differences) -> list[Row]:
    """One for each split and score, in the order of the card, others behind; columns for variants and differences.

    names: scores with their titles. Without any score all rows are there, and say that they are missing.
    """
    show = card.show if card else ShowPart()
    every = {key: score for seeds in found.values() for scores in seeds.values() for key, score in scores.items()}
    splits = dict.fromkeys([*show.splits, *sorted(split for split, _ in every)]) or ["all"]
    order = sorted(names, key=lambda name: show.scores.index(name) if name in show.scores else len(names))
    rows = []
    for key in ((split, name) for split in splits for name in order if (split, name) in every or not every):
        (split, name), score = key, every.get(key)
        row: Row = {"Score": names[name] if split == "all" else f"{words(split)}: {names[name]}"}
        for group, seeds in found.items():
            row[group] = _over_seeds([scores[key] for scores in seeds.values() if key in scores], card)
        row["Chance"] = real(score.chance) if score and not isnan(score.chance) else ""
        row["Items"] = count(score.items) if score else ""
        of = " ".join(key)
        rows.append(row | {title: above[of] for title, above in differences.items() if of in above})
    return rows


def _differences(found: Found, folders: Mapping[str, Path]) -> tuple[Differences, list[str]]:
    """What each variant scores above the first, and why where there is nothing to say.

    Paired by seeds where both have several, else item by item, of what lies in their folders.
    """
    columns, refused = dict[str, dict[str, Differs]](), list[str]()
    first, *others = [*found] or [""]
    for other in others:
        title, ours, theirs = f"{other} less {first}", found[other], found[first]
        if not any(ours.values()) or not any(theirs.values()):
            continue
        try:
            if len(ours) > 1 and len(theirs) > 1:
                columns[title] = {
                    " ".join(key): _differs(paired.difference.mean, *paired.difference.interval, paired.p)
                    for key, paired in compare_seeds(ours, theirs).items()
                }
            elif all(_by_item(folders.get(variant)) for variant in (other, first)):
                columns[title] = {
                    name: _differs(above, above - Z95 * error, above + Z95 * error, p)
                    for name, _, _, (above, error, p) in compare(folders[other], folders[first])
                }
        except DataError as fault:
            refused.append(f"{title}: {fault}")
    return columns, refused


def _by_item(folder: Path | None) -> bool:
    return folder is not None and any((folder / file).exists() for file in (VERDICTS, SAMPLES))


def _differs(value: float, low: float, high: float, p: float) -> Differs:
    return Differs(f"{real(value)} ({real(low)} to {real(high)})", p)


def _items(name: str, answered: Mapping[str, Mapping[str, JudgedItem]], layout: Layout) -> list[Table]:
    """The first items of each split, and those that were answered worst, with what each variant made of them.

    answered: items by variant and id.
    """
    every = {key: line for lines in answered.values() for key, line in lines.items()}
    splits: dict[str, list[str]] = {}
    for key, line in every.items():
        splits.setdefault(line["split"], []).append(key)
    first = [key for keys in splits.values() for key in keys[: -(-SHOWN // len(splits))]]
    wrong = {key: sum(1 - _right(lines.get(key)) for lines in answered.values()) for key in every if key not in first}
    worst = sorted((key for key in wrong if wrong[key] > 0), key=lambda key: -wrong[key])[:SHOWN]
    shown = {key: every[key] for key in (*first, *worst)}
    about = {key: f"the image {line['image']}" for key, line in shown.items() if line["image"]}
    sources = stored_images(layout.items(name), about, "bytes")
    drawn = {}
    for variant, lines in answered.items():
        to_draw = {key: line for key, line in shown.items() if not line["image"] and key in lines}
        about = {key: f"{line['question']}, drawn by {variant}" for key, line in to_draw.items()}
        drawn[variant] = stored_images(layout.answers(variant) / name, about, "image")

    def cells(key: str, line: JudgedItem) -> list[Any]:
        answers = [_answered(lines.get(key), drawn[variant].get(key)) for variant, lines in answered.items()]
        return [[*([sources[key]] if key in sources else []), line["question"]], [_expected(line)], *answers]

    return [
        Table(title, ["Item", "Expected", *answered], [cells(key, every[key]) for key in keys])
        for title, keys in {"The first items": first, "The worst of the others": worst}.items()
        if keys
    ]


def _answered(line: JudgedItem | None, drawn: ShownImage | None) -> list[Any]:
    """What a variant made of an item: its text, or its image and what is wrong there, and whether that is right."""
    if line is None:
        return [None]
    verdict = next(iter(line["verdicts"].values()), None)
    text = line["answer"] if line["image"] else "; ".join(verdict["faults"] if verdict else ()) or None
    judged = verdict is not None and verdict["right"] is not None
    return [*([drawn] if drawn else []), Judged(_right(line) >= 1, text) if judged else text]


def _right(line: JudgedItem | None) -> float:
    """How right the first rule finds an answer; 1 where there is none, or no rule judges it alone."""
    found = [verdict["right"] for verdict in line["verdicts"].values()][:1] if line else []
    return 1.0 if not found or found[0] is None else found[0]


def _expected(line: JudgedItem) -> str:
    """The truth of a question in short; of what is to be drawn the question says all."""
    truth = line["truth"] if line["image"] else "an image"
    return (truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False))[:LONGEST]
