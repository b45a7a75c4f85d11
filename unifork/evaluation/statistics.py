"""Scores and their errors: outcomes of items go in, values with a standard error come out.

Every score of the project is a sum of ratios of two sums over items: right answers over questions, true positives over
predicted ones, the mean of several splits. One formula therefore gives all errors: how much each item moves the value
(its influence), summed over what belongs together (the questions about one image), squared, added, with C / (C - 1) for
the C clusters of each ratio. For a plain proportion p of n independent items it is sqrt(p (1 - p) / (n - 1)). Where all
items agree the error is 0, which says that none disagreed, not that the score is certain: a Wilson interval of the
clusters stands beside it.

That is the error of the items alone. What another training seed would give is a matter of several runs: the spread of
their scores, and differences of variants that are paired by seed.

Shape suffixes: I items, C clusters, R ratios (both sums of each), S exchanges, N seeds, F ways to choose N signs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import fsum, inf, sqrt
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from unifork.errors import DataError

Z95 = 1.959963984540054
"""Standard errors on each side of a 95 % interval."""
MOST_FLIPPED = 16
"""Seeds up to which all choices of signs are counted."""
FEWEST_IN_BAND = 5
"""Runs that a prediction of one more needs."""
SWAPS, SWAPS_AT_ONCE = 2000, 100
"""Random exchanges of two models' answers that a p-value comes from."""


class Ratio(NamedTuple):
    """weight * sum(counted) / sum(among) over items; 0 where nothing is counted among."""

    counted_I: np.ndarray
    among_I: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True)
class Measure:
    """What a score is: a sum of ratios over the items of a split."""

    name: str
    ratios: tuple[Ratio, ...]
    members_I: np.ndarray
    """Which items it is of."""
    split: str = "all"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its error."""

    value: float
    standard_error: float | None
    """None for a single cluster, which has none."""
    interval: tuple[float, float] | None
    """95 % interval after Wilson, where all items agree."""
    items: int
    clusters: int
    """Groups of items that belong together, such as all about one image."""


@dataclass(frozen=True)
class Score(Estimate):
    """One number of a report and what is needed to judge it."""

    name: str
    split: str
    """Which part of the benchmark, for example `seen` or `held_out`."""
    chance: float
    """What a model that ignores its input would reach, by the benchmark's own means."""
    rule: str
    """How answers were read."""
    unread: float
    """Share of its items whose answer the rule could not read."""
    missing: int
    """Items of the benchmark without an answer: above 0 the score is partial."""
    items_hash: str
    """Identity of the items and their truths."""
    model: str
    """Identity of the model, or the file that its answers came in."""
    decoding: str
    """How answers or images were made, as far as it is recorded."""
    seed: int | None
    """Of items that are made."""
    note: str = ""
    """What else must be known to judge it."""

    def __str__(self) -> str:
        error = "one cluster" if self.standard_error is None else f"+- {self.standard_error:.4g}"
        partial = (f"; PARTIAL: {self.missing} missing" if self.missing else "") + (self.note and f"; {self.note}")
        return (
            f"{self.split} {self.name} {self.value:.10g} {error} (chance {self.chance:.4g}; {self.items} items, "
            f"{self.clusters} clusters; rule {self.rule}, {self.unread:.2%} unread{partial})"
        )


def share(counted_I: np.ndarray, members_I: np.ndarray, weight: float = 1.0) -> Ratio:
    """The mean of a count over some items."""
    return Ratio(counted_I * members_I, members_I * 1.0, weight)


def accuracy(name: str, right_I: np.ndarray, members_I: np.ndarray, split: str = "all", weight: float = 1.0) -> Measure:
    """How right some items are, on average, as a score."""
    return Measure(name, (share(right_I, members_I, weight),), members_I, split)


def binary(yes_I: np.ndarray, labels_I: np.ndarray, right_I: np.ndarray, members_I: np.ndarray) -> dict[str, Ratio]:
    """Accuracy, precision, recall, F1 and yes-ratio; positive is yes.

    yes, right: whether an answer says yes and is right, or how likely. An answer that is neither yes nor no is never
    right. Where nothing is predicted yes, precision and F1 are 0 (POPE's own scorer divides by zero).
    """
    positive_I, true_I, hits_I = yes_I * members_I, labels_I * members_I, yes_I * labels_I * members_I
    return {
        "accuracy": share(right_I, members_I),
        "precision": Ratio(hits_I, positive_I),
        "recall": Ratio(hits_I, true_I),
        "f1": Ratio(2 * hits_I, positive_I + true_I),
        "yes_ratio": share(yes_I, members_I),
    }


def total(name: str, parts: Iterable[Measure], scale: float = 1.0, split: str | None = None) -> Measure:
    """`scale` times the sum of measures of the same items, such as their mean; of one split unless it is named."""
    measures = list(parts)
    splits = {measure.split for measure in measures}
    if split is None and len(splits) != 1:
        raise DataError(f"the total {name!r} needs scores of one split, got {sorted(splits)}")
    ratios = tuple(ratio._replace(weight=scale * ratio.weight) for part in measures for ratio in part.ratios)
    return Measure(name, ratios, np.any([part.members_I for part in measures], axis=0), split or splits.pop())


def mean(name: str, parts: Sequence[Measure], split: str | None = None) -> Measure:
    """The unweighted mean of measures that may share items."""
    return total(name, parts, 1 / len(parts), split)


def together(right_I: np.ndarray, groups: Sequence[str], members_I: np.ndarray, weight: float = 1.0) -> Ratio:
    """The share of groups that are right as a whole, each of them once however many items it has."""
    numbers_I = numbered(groups)
    products, sizes = np.ones(numbers_I.max() + 1), np.bincount(numbers_I)
    np.multiply.at(products, numbers_I, right_I)
    return Ratio((products / sizes)[numbers_I] * members_I, (1 / sizes)[numbers_I] * members_I, weight)


def value(ratios: Iterable[Ratio]) -> float:
    """The sum of some ratios."""
    return fsum(_part(ratio) for ratio in ratios)


def estimate(measure: Measure, clusters: Sequence[str]) -> Estimate:
    """A measure's value and error. clusters: for every item, what it belongs to.

    Raises DataError without items or with another number of them.
    """
    if len(clusters) != len(measure.members_I) or not measure.members_I.any():
        raise DataError(f"{measure.name}: a score needs items with a cluster each, got {len(clusters)} clusters")
    found, numbers_I = value(measure.ratios), numbered(clusters)
    count = len(np.unique(numbers_I[measure.members_I]))
    error = _length(influence(measure.ratios, numbers_I)) if count > 1 else None
    scale = fsum(ratio.weight for ratio in measure.ratios)
    # what holds for all of them is uncertain as far as there are few
    interval = _wilson(found / scale, count, scale) if error == 0 and found in (0, scale) else None
    items = int(measure.members_I.sum())
    return Estimate(value=found, standard_error=error, interval=interval, items=items, clusters=count)


def influence(ratios: Iterable[Ratio], clusters: np.ndarray) -> np.ndarray:
    """How far each cluster moves the value, (C,): sums of (a - r b) / sum(b), added over the ratios a / b = r.

    clusters: number of each item's cluster, (I,).
    """
    moved_C = np.zeros(clusters.max() + 1)
    for ratio in ratios:
        among, here = ratio.among_I.sum(), _part(ratio._replace(weight=1.0))
        count = len(np.unique(clusters[ratio.among_I != 0]))
        if count > 1:
            scale = ratio.weight / among * np.sqrt(count / (count - 1))
            moved_C += scale * np.bincount(clusters, ratio.counted_I - here * ratio.among_I, len(moved_C))
    return moved_C


class Difference(NamedTuple):
    """What one model scores above another on the same items; p: by exchanging their answers at random."""

    value: float
    standard_error: float
    p: float


def difference(first: Measure, second: Measure, clusters: Sequence[str]) -> Difference:
    """`first` less `second`, paired: the same items, answers exchanged cluster by cluster."""
    observed, numbers_I = value(first.ratios) - value(second.ratios), numbered(clusters)
    error = _length(influence(first.ratios, numbers_I) - influence(second.ratios, numbers_I))
    pairs = list(zip(first.ratios, second.ratios, strict=True))
    moves_RC = np.array([np.bincount(numbers_I, b[n] - a[n]) for a, b in pairs for n in (0, 1)])
    moves_RC = moves_RC[:, moves_RC.any(axis=0)]  # to exchange equal answers changes nothing
    rng, least, extreme = np.random.default_rng(0), abs(observed) * (1 - 1e-9) - 1e-12, 0
    for _ in range(SWAPS // SWAPS_AT_ONCE):
        moved_RS = moves_RC @ (rng.random((moves_RC.shape[1], SWAPS_AT_ONCE)) < 0.5)
        found_S = np.zeros(SWAPS_AT_ONCE)
        for (a, b), counted_S, among_S in zip(pairs, moved_RS[::2], moved_RS[1::2], strict=True):
            ours_S = _divided(a.counted_I.sum() + counted_S, a.among_I.sum() + among_S)
            found_S += a.weight * (ours_S - _divided(b.counted_I.sum() - counted_S, b.among_I.sum() - among_S))
        extreme += int((np.abs(found_S) >= least).sum())
    return Difference(observed, error, (1 + extreme) / (1 + SWAPS))


class Spread(NamedTuple):
    """Values of one run for each seed: mean, standard deviation, 95 % t interval of the mean; of one run its value."""

    mean: float
    deviation: float
    interval: tuple[float, float]
    runs: int


def spread(values: Sequence[float], outside: float = 0.05) -> Spread:
    """Of the values of several runs, one for each seed. The interval of a single run is without bounds.

    outside: probability that the interval misses.
    """
    mean, runs = fmean(values), len(values)
    if runs == 1:
        return Spread(mean, 0.0, (-inf, inf), runs)
    deviation = stdev(values)
    reach = t_reach(runs - 1, outside) * deviation / sqrt(runs)
    return Spread(mean, deviation, (mean - reach, mean + reach), runs)


def p_values(differences: Sequence[float]) -> tuple[float, float]:
    """Two-sided p of paired differences, one for each seed: by Student's t, and exactly, by all choices of their signs.

    The second is at least 2 / 2^N for N seeds; above MOST_FLIPPED it is not counted (NaN). Of one seed both are 1.
    """
    found, count = spread(differences), len(differences)
    scale = found.deviation / sqrt(count)
    t = 0.0 if count == 1 or found.mean == 0 else abs(found.mean) / scale if scale else inf
    by_t = float(2 * stdtr(max(count - 1, 1), -t))
    if count > MOST_FLIPPED:
        return by_t, float("nan")
    sums_F = np.array(list(product((-1, 1), repeat=count))) @ np.array(differences)
    return by_t, float((np.abs(sums_F) >= abs(fsum(differences)) * (1 - 1e-9) - 1e-12).mean())


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979), in their order: who rejects those below 0.05 errs at all
    in at most 5 % of such tables."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, number in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[number]))
        adjusted[number] = largest
    return adjusted


def prediction(values: Sequence[float], fewest: int = FEWEST_IN_BAND) -> tuple[float, float]:
    """95 % prediction interval for one more run: mean +- t s sqrt(1 + 1/n). Raises DataError for fewer runs."""
    if len(values) < fewest:
        raise DataError(f"a prediction needs {fewest} runs, got {len(values)}")
    reach = t_reach(len(values) - 1) * stdev(values) * sqrt(1 + 1 / len(values))
    return fmean(values) - reach, fmean(values) + reach


def t_reach(freedom: int, outside: float = 0.05) -> float:
    """Standard errors on each side of an interval by Student's t that misses with probability `outside`."""
    return float(-stdtrit(freedom, outside / 2))


def _part(ratio: Ratio) -> float:
    return float(ratio.weight * _divided(ratio.counted_I.sum(), ratio.among_I.sum()))


def _divided(counted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Their ratio, 0 where nothing is counted among."""
    return np.asarray(np.where(among > 0, counted / np.where(among > 0, among, 1), 0.0))


def numbered(names: Sequence[str]) -> np.ndarray:
    """Names as numbers from 0, (I,)."""
    return np.unique(np.asarray(names, dtype=str), return_inverse=True)[1]


def _length(influence_C: np.ndarray) -> float:
    return float(np.sqrt((influence_C**2).sum()))


def _wilson(p: float, count: int, scale: float) -> tuple[float, float]:
    center, width = p + Z95**2 / (2 * count), Z95 * np.sqrt(p * (1 - p) / count + Z95**2 / (4 * count**2))
    low, high = ((center + sign * width) / (1 + Z95**2 / count) for sign in (-1, 1))
    return scale * max(0.0, float(low)), scale * min(1.0, float(high))
