"""Rows of a step, and who gets them."""

import numpy as np
import pytest

from unifork.batch import assign_rows_to_workers, pack_step
from unifork.errors import ConfigError
from unifork.vocabulary import TASKS


def mix(seed, count):
    """Lengths as in the paper's mix, half of each task: images of 576 + 2 tokens with captions of
    15 to 90 tokens, or with questions and answers of 40 to 500."""
    rng = np.random.default_rng(seed)
    tasks = [TASKS[int(n)] for n in rng.integers(0, 2, count)]
    text = {"generation": lambda: rng.integers(15, 90), "understanding": lambda: rng.integers(40, 500)}
    return [578 + int(text[task]()) for task in tasks], tasks


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("row_tokens", [1350, 4096, 8192, 16384])
def test_every_document_is_in_exactly_one_row_and_fits(row_tokens, multiple):
    lengths, tasks = mix(0, 384)
    packing = pack_step(lengths, tasks, row_tokens, multiple)
    assert sorted(n for row in packing.rows for n in row) == list(range(384))
    assert all(sum(lengths[n] for n in row) <= packing.row_tokens for row in packing.rows)
    assert packing.row_tokens <= row_tokens
    assert len(packing.rows) % multiple == 0
    assert packing.fill == pytest.approx(sum(lengths) / len(packing.rows) / packing.row_tokens)


FILLS = {
    8192: {1: 0.96, 2: 0.96, 4: 0.96, 8: 0.96, 16: 0.95, 32: 0.94},
    16384: dict.fromkeys((1, 2, 4, 8, 16, 32), 0.96),
}


@pytest.mark.parametrize(("row_tokens", "workers"), [(tokens, n) for tokens, fills in FILLS.items() for n in fills])
def test_rows_are_well_filled_on_any_number_of_workers(row_tokens, workers):
    for seed in range(10):
        lengths, tasks = mix(seed, 384)
        assert pack_step(lengths, tasks, row_tokens, workers).fill >= FILLS[row_tokens][workers]


def test_tasks_are_neighbours_and_at_most_one_row_is_mixed():
    lengths, tasks = mix(2, 100)
    rows = pack_step(lengths, tasks, 8192, 8).rows
    order = [TASKS.index(tasks[n]) for row in rows for n in row]
    assert order == sorted(order)
    assert sum(len({tasks[n] for n in row}) > 1 for row in rows) <= 1


def test_every_worker_gets_as_many_microbatches_and_nothing_is_lost():
    for workers, per_microbatch in [(1, 1), (2, 1), (4, 2), (3, 4), (16, 1)]:
        rows = pack_step([5] * 11, ["generation"] * 11, 6, workers * per_microbatch).rows
        assigned = assign_rows_to_workers(rows, workers, per_microbatch)
        assert len({len(share) for share in assigned}) == 1
        assert all(len(microbatch) == per_microbatch for share in assigned for microbatch in share)
        assert sorted(n for share in assigned for batch in share for row in batch for n in row) == list(range(11))


def test_a_document_longer_than_a_row_is_an_error_that_names_both():
    with pytest.raises(ConfigError, match=r"row_tokens is 512.*600 tokens"):
        pack_step([600], ["generation"], 512)
