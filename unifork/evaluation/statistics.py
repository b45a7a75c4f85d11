"""Scores and their errors: per-sample outcomes go in, values with a standard error come out.

Every score of the project is a ratio of two sums over samples: right answers over questions, true
positives over predicted ones. One formula therefore gives all errors, the linearized one for ratios;
for a plain proportion p of n samples it equals sqrt(p (1 - p) / n). It is 0 where every sample agrees,
which says that no sample disagreed, not that the score is certain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from unifork.errors import DataError


@dataclass(frozen=True)
class Score:
    """One number of a report and what is needed to judge it."""

    name: str
    value: float
    standard_error: float
    chance: float
    """What a model that ignores its input would reach, measured by the benchmark's own means."""
    samples: int
    seed: int
    """Seed of the benchmark's items."""
    split: str
    """Which part of the benchmark, for example `seen` or `held_out`."""

    def __str__(self) -> str:
        return f"{self.split} {self.name} {self.value:.3f} +- {self.standard_error:.3f} (chance {self.chance:.3f})"


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    standard_error: float


def ratio(counted: Sequence[float], among: Sequence[float]) -> Estimate:
    """sum(counted) / sum(among) over independent samples; 0 where nothing is counted among.

    Raises DataError without samples or with unequal numbers of them.
    """
    if len(counted) != len(among) or not len(counted):
        raise DataError(f"a score needs as many counts as samples and at least one, got {len(counted)}, {len(among)}")
    a, b = np.asarray(counted, dtype=np.float64), np.asarray(among, dtype=np.float64)
    if b.sum() == 0:
        return Estimate(0.0, 0.0)
    value = float(a.sum() / b.sum())
    return Estimate(value, float(np.sqrt(((a - value * b) ** 2).sum()) / b.sum()))


def proportion(correct: Sequence[bool]) -> Estimate:
    """The share of samples that are right."""
    return ratio([float(right) for right in correct], [1.0] * len(correct))


def mean(name: str, scores: Sequence[Score]) -> Score:
    """The unweighted mean of independent scores of one split, with its error and its chance level."""
    if len({score.split for score in scores}) != 1 or len({score.seed for score in scores}) != 1:
        raise DataError(f"the mean {name!r} needs scores of one split and seed, got {[s.split for s in scores]}")
    return Score(
        name=name,
        value=float(np.mean([score.value for score in scores])),
        standard_error=float(np.sqrt(sum(score.standard_error**2 for score in scores)) / len(scores)),
        chance=float(np.mean([score.chance for score in scores])),
        samples=sum(score.samples for score in scores),
        seed=scores[0].seed,
        split=scores[0].split,
    )


def binary(predicted: Sequence[bool | None], labels: Sequence[bool]) -> dict[str, Estimate]:
    """Accuracy, precision, recall, F1 and yes-ratio; positive is yes.

    A prediction of None is neither yes nor no, and never right. Where nothing is predicted yes,
    precision and F1 are 0 (POPE's own scorer divides by zero).
    """
    positive = [float(guess is True) for guess in predicted]
    true = [float(label) for label in labels]
    hits = [float(guess is True and label) for guess, label in zip(predicted, labels, strict=True)]
    return {
        "accuracy": proportion([guess == label for guess, label in zip(predicted, labels, strict=True)]),
        "precision": ratio(hits, positive),
        "recall": ratio(hits, true),
        "f1": ratio([2 * hit for hit in hits], [a + b for a, b in zip(positive, true, strict=True)]),
        "yes_ratio": ratio(positive, [1.0] * len(positive)),
    }
