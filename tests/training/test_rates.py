"""How fast training is, in a file beside the history."""

import pytest

from unifork.training.history import POINTS, RATES, Rates, read


def test_rates_are_those_of_the_steps_between_and_end_at_the_checkpoint(tmp_path):
    rates = Rates(tmp_path, 0, 2 * POINTS)
    for step in range(1, 6):
        rates.add(step, tokens=100, documents=8)
    rows = read(tmp_path, RATES)
    assert [row["finished_steps"] for row in rows] == [2, 4]
    assert all(row["memory_gib"] > 0 for row in rows)
    assert rows[1]["tokens_per_second"] == pytest.approx(100 / 8 * rows[1]["documents_per_second"])
    Rates(tmp_path, 3, 2 * POINTS).add(4, tokens=100, documents=8)
    assert [row["finished_steps"] for row in read(tmp_path, RATES)] == [2, 4]
    Rates(tmp_path, 0, 2 * POINTS)
    assert read(tmp_path, RATES) == []
