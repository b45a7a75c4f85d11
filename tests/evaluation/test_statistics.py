"""Scores are ratios of sums with linearized errors; plain proportions are the textbook case."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from unifork.errors import DataError
from unifork.evaluation.statistics import Score, binary, mean, proportion, ratio


def test_the_error_of_a_proportion_is_the_binomial_one():
    value, error = proportion([True] * 30 + [False] * 70)
    assert value == pytest.approx(0.3)
    assert error == pytest.approx((0.3 * 0.7 / 100) ** 0.5)
    assert proportion([True, True]) == (1.0, 0.0)


def test_errors_of_f1_agree_with_repeated_sampling():
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(400):
        labels = rng.random(200) < 0.5
        predicted = np.where(rng.random(200) < 0.7, labels, ~labels)
        f1 = binary(predicted.tolist(), labels.tolist())["f1"]
        values.append(f1.value)
        errors.append(f1.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_f1_is_the_harmonic_mean_and_undecided_answers_are_never_right():
    metrics = binary([True, True, None, False], [True, False, False, False])
    assert {name: estimate.value for name, estimate in metrics.items()} == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 0.5}
    )


def test_nothing_said_yes_scores_zero_instead_of_dividing_by_it():
    metrics = binary([False, False], [True, False])
    assert (metrics["precision"], metrics["f1"], metrics["accuracy"].value) == ((0.0, 0.0), (0.0, 0.0), 0.5)


def test_means_add_errors_of_independent_scores_and_refuse_to_mix_splits():
    scores = [Score("a", 0.5, 0.03, 0.1, 10, 0, "seen"), Score("b", 1.0, 0.04, 0.3, 20, 0, "seen")]
    assert asdict(mean("overall", scores)) == pytest.approx(
        {"name": "overall", "value": 0.75, "standard_error": 0.025, "chance": 0.2, "samples": 30, "seed": 0}
        | {"split": "seen"}
    )
    assert json.loads(json.dumps(asdict(scores[0])))["value"] == 0.5
    with pytest.raises(DataError, match="held_out"):
        mean("overall", [scores[0], Score("b", 1.0, 0.04, 0.3, 20, 0, "held_out")])


@pytest.mark.parametrize(("counted", "among"), [([], []), ([1.0], [1.0, 1.0])])
def test_scores_need_samples(counted, among):
    with pytest.raises(DataError, match="at least one"):
        ratio(counted, among)
