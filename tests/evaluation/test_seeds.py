"""Statistics over training seeds, against tables of Student's t and counts by hand."""

import json
from itertools import product
from math import inf, isnan

import numpy as np
import pytest

from unifork.errors import ConfigError, DataError
from unifork.evaluation.comparison import Earlier, EarlierRun, compare_seeds, placed, read_runs
from unifork.evaluation.statistics import Score, holm, p_values, prediction, spread, t_reach

TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 30: 2.04227}
"""Two-sided 95 % points of Student's t, from printed tables."""


def scored(value, split="seen", name="overall", **changes):
    plain = {"standard_error": 0.02, "interval": None, "items": 9, "clusters": 9, "chance": 0.0, "rule": "official"}
    plain |= {"unread": 0.0, "missing": 0, "items_hash": "a", "model": "m", "decoding": "d", "seed": 0, **changes}
    return {(split, name): Score(name, split, value=value, **plain)}


def of_seeds(*values, **changes):
    return {seed: scored(value, **changes) for seed, value in enumerate(values)}


@pytest.mark.parametrize("freedom", TABLE)
def test_students_t_is_that_of_the_tables(freedom):
    assert t_reach(freedom) == pytest.approx(TABLE[freedom], rel=1e-5)
    differences = np.linspace(-1, 1, freedom + 1)
    at = TABLE[freedom] * np.std(differences, ddof=1) / (freedom + 1) ** 0.5
    assert p_values(differences + at)[0] == pytest.approx(0.05, rel=1e-4)
    assert p_values(differences + 1e9)[0] == pytest.approx(0.0, abs=1e-6)
    assert (p_values([0.0] * 5)[0], p_values([0.5] * 5)[0]) == (1.0, 0.0)


def test_a_spread_is_the_textbooks():
    mean, deviation, (low, high), runs = spread([0.6, 0.7, 0.8])
    assert (mean, deviation, runs) == (pytest.approx(0.7), pytest.approx(0.1), 3)
    assert (low, high) == (pytest.approx(0.7 - 4.30265 * 0.1 / 3**0.5), pytest.approx(0.7 + 4.30265 * 0.1 / 3**0.5))
    assert spread([0.6]) == (0.6, 0.0, (-inf, inf), 1)


def test_the_exact_p_counts_all_signs():
    differences = [0.1, 0.2, 0.3, -0.05]
    extreme = [abs(np.dot(signs, differences)) >= 0.55 - 1e-12 for signs in product((-1, 1), repeat=4)]
    assert p_values(differences)[1] == pytest.approx(np.mean(extreme))
    assert p_values([0.1, 0.2, 0.3])[1] == 2 / 8
    assert p_values([0.0, 0.0]) == (1.0, 1.0)
    assert p_values([0.1, 0.1, 0.1])[0] == pytest.approx(0.0, abs=1e-12)
    assert isnan(p_values([0.1] * 17)[1])


def test_p_and_interval_agree_on_what_is_sure():
    for differences in ([0.1, 0.12, 0.3], [0.1, 0.12, 0.11], [-0.1, 0.2, 0.3, 0.1]):
        low, high = spread(differences).interval
        assert (p_values(differences)[0] < 0.05) == (low > 0 or high < 0)


def test_holm_is_the_papers():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_one_more_run_lies_in_the_predicted_interval_19_times_in_20():
    rng = np.random.default_rng(0)
    runs = rng.normal(0.7, 0.05, (4000, 6))
    inside = [low <= run[5] <= high for run in runs for low, high in [prediction(list(run[:5]))]]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)
    with pytest.raises(DataError, match="needs 5 runs, got 4"):
        prediction([0.1] * 4)


def test_variants_are_paired_by_seed():
    """Seeds that differ alike in both say nothing of the difference, which is surer than either."""
    found = compare_seeds(of_seeds(0.50, 0.70, 0.90), of_seeds(0.45, 0.66, 0.84))["seen", "overall"]
    assert found.difference.mean == pytest.approx(0.05)
    assert found.difference.deviation == pytest.approx(0.01)
    assert found.first.deviation == pytest.approx(0.2)
    assert found.difference.interval[0] > 0.02
    assert found.p_exact == 2 / 8


def test_only_what_can_be_paired_is_compared():
    ours, theirs = of_seeds(0.5, 0.7, 0.9), of_seeds(0.4, 0.6)
    theirs[2] = {}  # not there yet
    assert compare_seeds(ours, theirs)["seen", "overall"].difference.runs == 2
    ours[1] |= scored(0.3, name="colors")
    assert list(compare_seeds(ours, theirs)) == [("seen", "overall")]
    with pytest.raises(DataError, match="two common seeds are needed"):
        compare_seeds(ours, {1: theirs[1]})
    with pytest.raises(DataError, match="seen overall: items or rules are not the same"):
        compare_seeds(ours, of_seeds(0.5, 0.7, items_hash="b"))


def test_a_file_of_earlier_runs_is_read_or_refused(tmp_path):
    path = tmp_path / "runs.json"
    runs = [
        EarlierRun(seed=seed, seconds=60.0, machine="m", scores={"a seen b": Earlier(value=value, error=0.02)})
        for seed, value in enumerate([0.6, 0.7, 0.65, 0.7, 0.75])
    ]
    path.write_text(json.dumps([run.model_dump() for run in runs]))
    assert read_runs(path) == runs
    (score,) = placed(runs, runs[0], "x")
    assert (score.name, score.inside) == ("a seen b", True)
    assert str(score) == "a seen b 0.60, usual 0.51 to 0.85: ok"
    far = runs[0].model_copy(update={"scores": {"a seen b": Earlier(value=0.49, error=None)}})
    assert str(placed(runs, far, "x")[0]).endswith("0.49, usual 0.51 to 0.85: outside")
    equal = [run.model_copy(update={"scores": {"a seen b": Earlier(value=1.0, error=0.0)}}) for run in runs]
    for value, inside in ((1.0, True), (0.98, True), (0.96, False)):
        run = runs[0].model_copy(update={"scores": {"a seen b": Earlier(value=value, error=0.02, items=50)}})
        assert placed(equal, run, "x")[0].inside is inside
    with pytest.raises(ConfigError, match="unknown score 'a seen b'"):
        placed(runs, far.model_copy(update={"scores": {}}), "x")
    path.write_text(path.read_text().replace('"value": 0.75', '"value": "?"'))
    with pytest.raises(DataError, match=r"runs\.json: 4\.scores\.a seen b\.value: Input should be a valid number"):
        read_runs(path)
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        read_runs(tmp_path / "none.json")
