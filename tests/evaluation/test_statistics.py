"""Scores are sums of ratios with linearized errors by cluster; plain proportions are the textbook case."""

import numpy as np
import pytest

from unifork.errors import DataError
from unifork.evaluation.statistics import (
    Measure,
    Ratio,
    binary,
    difference,
    estimate,
    mean,
    share,
    together,
    total,
    value,
)


def measure(right, members=None, name="accuracy", split="all"):
    right = np.asarray(right, dtype=float)
    members = np.ones(len(right), dtype=bool) if members is None else np.asarray(members)
    return Measure(name, (share(right, members),), members, split)


def apart(count):
    return [str(number) for number in range(count)]


def f1(yes, labels):
    yes, labels = np.asarray(yes, dtype=float), np.asarray(labels, dtype=float)
    members = np.ones(len(yes), dtype=bool)
    return {
        name: Measure(name, (ratio,), members)
        for name, ratio in binary(yes, labels, (yes == labels) * 1.0, members).items()
    }


def test_the_error_of_a_proportion_is_the_textbooks():
    found = estimate(measure([1] * 30 + [0] * 70), apart(100))
    assert found.value == pytest.approx(0.3)
    assert found.standard_error == pytest.approx((0.3 * 0.7 / 99) ** 0.5)
    assert (found.items, found.clusters, found.interval) == (100, 100, None)


def test_where_all_agree_wilsons_interval_says_how_little_that_is():
    found = estimate(measure([1] * 10), apart(10))
    assert (found.value, found.standard_error) == (1.0, 0.0)
    assert found.interval == pytest.approx((0.7224672, 1.0))
    assert estimate(measure([0] * 10), apart(10)).interval == pytest.approx((0.0, 0.2775328))
    points = total("points", [measure([1] * 10), measure([1] * 10)], 100.0)
    assert estimate(points, apart(10)).interval == pytest.approx((144.49344, 200.0))


def test_errors_of_f1_and_of_clusters_agree_with_repeated_sampling():
    rng = np.random.default_rng(0)
    values, errors, naive = [], [], []
    for _ in range(400):
        easy = np.repeat(rng.random(60), 4)  # four questions about each image, which are easy or hard together
        labels = rng.random(240) < 0.5
        yes = np.where(rng.random(240) < 0.4 + 0.6 * easy, labels, ~labels)
        found = f1(yes, labels)["f1"]
        values.append(value(found.ratios))
        errors.append(estimate(found, [str(n // 4) for n in range(240)]).standard_error)
        naive.append(estimate(found, apart(240)).standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)
    assert np.mean(naive) < 0.95 * np.mean(errors)


def test_f1_is_the_harmonic_mean_and_undecided_answers_are_never_right():
    yes, labels, right = np.array([1.0, 1, 0, 0]), np.array([1.0, 0, 0, 0]), np.array([1.0, 0, 0, 1])
    ratios = binary(yes, labels, right, np.ones(4, dtype=bool))  # the third answer is neither yes nor no
    assert {name: value([ratio]) for name, ratio in ratios.items()} == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 0.5}
    )


def test_nothing_that_says_yes_and_no_positives_score_zero_instead_of_dividing_by_it():
    for labels in ([1, 0], [0, 0]):
        found = {name: estimate(found, apart(2)) for name, found in f1([0, 0], labels).items()}
        assert (found["precision"].value, found["f1"].value) == (0.0, 0.0)


def test_one_cluster_has_no_error():
    assert estimate(measure([1, 0, 1]), ["a"] * 3).standard_error is None


def test_a_mean_over_shared_items_is_as_sure_as_each_and_over_others_surer():
    """The splits of POPE share their positive questions: to add errors as if they did not makes them too small."""
    right = np.random.default_rng(1).random(400) < 0.6
    shared = [measure(right), measure(right)]
    clusters = apart(400)
    alone = estimate(shared[0], clusters).standard_error
    assert estimate(mean("mean", shared), clusters).standard_error == pytest.approx(alone)
    first = np.arange(400) < 200
    halves = [measure(right, first, "a"), measure(right, ~first, "b")]
    errors = [estimate(half, clusters).standard_error for half in halves]
    found = estimate(mean("mean", halves), clusters)
    assert found.standard_error == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    assert found.items == 400
    with pytest.raises(DataError, match="held_out"):
        mean("mean", [measure(right), measure(right, split="held_out")])


def test_groups_are_right_as_a_whole_and_count_once_each():
    right, groups = np.array([1.0, 1, 1, 0, 0.5, 0.5]), ["a", "a", "b", "b", "c", "c"]
    ratio = together(right, groups, np.ones(6, dtype=bool))
    assert value([ratio]) == pytest.approx((1 + 0 + 0.25) / 3)
    assert value([together(right, groups, np.array([1, 1, 0, 0, 0, 0], dtype=bool))]) == 1.0


def test_a_paired_difference_sees_what_two_errors_would_not():
    rng = np.random.default_rng(2)
    worse = rng.random(500) < 0.5
    better = worse | (rng.random(500) < 0.06)
    found = difference(measure(better), measure(worse), apart(500))
    alone = estimate(measure(worse), apart(500)).standard_error
    assert found.standard_error < alone / 2
    assert found.value == pytest.approx(np.mean(better) - np.mean(worse))
    assert found.p < 0.01
    same = difference(measure(worse), measure(worse), apart(500))
    assert (same.value, same.p) == (0.0, 1.0)


def test_the_p_of_models_that_do_not_differ_is_uniform():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(60):
        labels = rng.random(120) < 0.5
        ones, others = (f1(np.where(rng.random(120) < 0.7, labels, ~labels), labels)["f1"] for _ in range(2))
        found.append(difference(ones, others, [str(n // 3) for n in range(120)]).p)
    assert 0.35 < np.mean(found) < 0.65
    assert np.mean(np.array(found) < 0.1) < 0.25


@pytest.mark.parametrize(("count", "clusters"), [(0, 0), (2, 1)])
def test_scores_need_items_with_a_cluster_each(count, clusters):
    with pytest.raises(DataError, match="needs items"):
        estimate(Measure("a", (Ratio(np.ones(count), np.ones(count)),), np.ones(count, dtype=bool)), apart(clusters))
