"""Models side by side: on the same items, over the same training seeds, and beside earlier runs of the same recipe.

In: folders of scores or answers, scores by seed, a file of earlier runs. Out: differences with errors and p, and
whether the scores of a run lie where one more run is expected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from unifork.config import StrictModel, load_eval, load_text
from unifork.errors import DataError, one_of, refusing
from unifork.evaluation.archive import read_json
from unifork.evaluation.items import Item, faults
from unifork.evaluation.names import SAMPLES
from unifork.evaluation.scoring import VERDICTS, outcomes
from unifork.evaluation.statistics import (
    Difference,
    Measure,
    Score,
    Spread,
    difference,
    p_values,
    prediction,
    spread,
    value,
)
from unifork.evaluation.suites import Verdict, suite_of
from unifork.evaluation.text_scores import text_measures
from unifork.shards.manifest import read_manifest

ITEM = [field.name for field in fields(Item)]

Scores = Mapping[tuple[str, str], Score]
"""By split and name."""


class Compared(NamedTuple):
    """One score of two models on the same items."""

    name: str
    first: float
    second: float
    difference: Difference


def compare(first: Path, second: Path, rule: str | None = None) -> list[Compared]:
    """The scores of two models side by side, item by item, by one rule: by the card's first unless it is named.

    first, second: folders of scores with verdicts, or of a text benchmark's answers, whose rules are their metrics.
    Raises DataError where they are of other benchmarks or items, or lack the rule.
    """
    of_text = all((folder / SAMPLES).exists() for folder in (first, second))
    with refusing(DataError, f"{first}, {second}: no verdicts of one form", LookupError, TypeError):
        clusters, measures = _text_outcomes(first, second) if of_text else _verdicts(first, second, rule)
    return [
        Compared(f"{a.split} {a.name}", value(a.ratios), value(b.ratios), difference(a, b, clusters))
        for a, b in zip(*measures, strict=True)
    ]


def _text_outcomes(first: Path, second: Path) -> tuple[list[str], list[Sequence[Measure]]]:
    names = {read_manifest(folder).dataset for folder in (first, second)}
    if len(names) != 1:
        raise DataError(f"{first}, {second}: of {sorted(names)}; one benchmark is needed")
    card = load_text(names.pop())
    (ours, items), (theirs, others) = (text_measures(card, folder) for folder in (first, second))
    if items != others:
        raise DataError(f"{first}, {second}: questions are not the same in both")
    return [str(number) for number in range(len(items))], [[part[0] for part in parts] for parts in (ours, theirs)]


def _verdicts(first: Path, second: Path, rule: str | None) -> tuple[list[str], list[Sequence[Measure]]]:
    tables = [{line["id"]: line for line in read_json(folder / VERDICTS)} for folder in (first, second)]
    names = [{line["benchmark"] for line in table.values()} for table in tables]
    if names[0] != names[1] or len(names[0]) != 1:
        raise DataError(f"{first}, {second}: of {sorted(names[0])} and {sorted(names[1])}; one benchmark is needed")
    contents = [{name: [line[key] for key in ITEM] for name, line in table.items()} for table in tables]
    if other := sorted(
        name for name in {**contents[0], **contents[1]} if contents[0].get(name) != contents[1].get(name)
    ):
        raise DataError(f"{first}, {second}: {faults('items are not the same in both', other)}")
    if len(versions := {str(line.get("version")) for table in tables for line in table.values()}) > 1:
        raise DataError(f"{first}, {second}: rules of the versions {' and '.join(sorted(versions))}; score both again")
    card = load_eval(names[0].pop())
    suite, _ = suite_of(card)
    chosen = rule or card.score.rules[0]
    suite.rule(chosen, "--rule")
    items = [Item(**{name: line[name] for name in ITEM}) for line in tables[0].values()]
    measures: list[Sequence[Measure]] = []
    for table, folder in zip(tables, (first, second), strict=True):
        if any(chosen not in table[item.id]["verdicts"] for item in items):
            raise DataError(
                f"{folder}: no verdicts of items by rule {chosen!r}; a distance has none, else score by it first"
            )
        verdicts = [Verdict(**table[item.id]["verdicts"][chosen]) for item in items]
        measures.append(suite.measures(items, *outcomes(verdicts)))
    return [item.cluster for item in items], measures


class Paired(NamedTuple):
    """One score of two variants with the same training seeds; the difference is of the first less the second."""

    first: Spread
    second: Spread
    difference: Spread
    p: float
    """By Student's t."""
    p_exact: float
    """By all choices of the differences' signs; at least 2 / 2^N for N seeds."""

    def __str__(self) -> str:
        low, high = self.difference.interval
        return (
            f"{self.first.mean:.4g} - {self.second.mean:.4g} = {self.difference.mean:.4g}, {low:.4g} to {high:.4g}; "
            f"sd {self.difference.deviation:.3g} over {self.difference.runs} seeds"
        )


def compare_seeds(first: Mapping[int, Scores], second: Mapping[int, Scores]) -> dict[tuple[str, str], Paired]:
    """Every score that both variants have, paired by training seed.

    Raises DataError where fewer than two seeds are common, or where items or rules differ.
    """
    seeds = sorted(seed for seed in first.keys() & second.keys() if first[seed] and second[seed])
    if len(seeds) < 2:
        raise DataError(f"two common seeds are needed, got those of {sorted(first)} and {sorted(second)}")
    found = {}
    for key in first[seeds[0]]:
        pairs = [(first[seed].get(key), second[seed].get(key)) for seed in seeds]
        ours, theirs = ([score for score in side if score] for side in zip(*pairs, strict=True))
        if len(ours) == len(theirs) == len(seeds):
            if len({(score.items_hash, score.rule) for score in ours + theirs}) > 1:
                raise DataError(f"{' '.join(key)}: items or rules are not the same in all runs")
            found[key] = paired([score.value for score in ours], [score.value for score in theirs])
    return found


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Values of two variants, paired by training seed."""
    above = [a - b for a, b in zip(first, second, strict=True)]
    return Paired(spread(first), spread(second), spread(above), *p_values(above))


class Earlier(StrictModel):
    """A score of an earlier run."""

    value: float
    error: float | None
    """Its standard error over the items alone."""
    items: int | None = None


class EarlierRun(StrictModel):
    """One run of a recipe: a row of a file of earlier runs."""

    seed: int
    seconds: float
    """Of training."""
    machine: str
    scores: dict[str, Earlier]
    """By `<benchmark> <split> <name>`."""


def read_runs(path: Path) -> list[EarlierRun]:
    """A file of earlier runs, a JSON list. Raises DataError where it is not there or of another form."""
    try:
        return TypeAdapter(list[EarlierRun]).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except ValidationError as error:
        fault = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


class Placed(NamedTuple):
    """A score of a run and where one more run was expected to have it, in 95 % of cases."""

    name: str
    value: float
    usual: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.usual
        return f"{self.name} {self.value:.2f}, usual {low:.2f} to {high:.2f}: {'ok' if self.inside else 'outside'}"

    @property
    def inside(self) -> bool:
        """Whether it lies there."""
        return self.usual[0] <= self.value <= self.usual[1]


def placed(earlier: Sequence[EarlierRun], run: EarlierRun, place: str) -> list[Placed]:
    """Every score that all earlier runs have, beside the interval that they predict for `run`, cut to 0..1 for shares.

    Where all earlier runs have the same value the interval is one item of `run` wide on each side.

    Raises DataError for fewer than five earlier runs, ConfigError where the run lacks a score.
    """
    found = []
    for name in earlier[0].scores if earlier else ():
        if all(name in other.scores for other in earlier):
            one_of("score", name, run.scores, place)
            values, value = [other.scores[name].value for other in earlier], run.scores[name].value
            low, high = prediction(values)
            if low == high and (items := run.scores[name].items):  # equal in all: an item more or less says nothing
                low, high = low - 1 / items, high + 1 / items
            if all(0 <= each <= 1 for each in [*values, value]):
                low, high = max(low, 0.0), min(high, 1.0)
            found.append(Placed(name, value, (low, high)))
    return found
