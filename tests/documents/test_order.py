"""Which documents belong to a step: counts, permutations, seeking."""

import numpy as np
import pytest

from unifork.documents.order import MixtureOrder, SetOrder, schedule
from unifork.errors import ConfigError


@pytest.mark.parametrize(
    "weights", [[1.0], [0.5, 0.5], [0.6, 0.05, 0.1, 0.25], [1 / 3, 2 / 3], [7.0, 2.0, 2.0], [0.999, 0.001]]
)
def test_every_prefix_is_within_one_document_of_the_weights(weights):
    slots = schedule(weights)
    shares = np.array(weights) / sum(weights)
    assigned = np.zeros(len(weights))
    for number in range(3 * len(slots)):
        assigned[slots[number % len(slots)]] += 1
        assert (abs(assigned - shares * (number + 1)) < 1 + 1e-3 * (number + 1)).all()
    exact = np.bincount(slots, minlength=len(weights)) / len(slots)
    assert abs(exact - shares).max() < 1e-3


def test_a_share_too_small_to_be_scheduled_is_an_error():
    with pytest.raises(ConfigError, match="1/1000"):
        schedule([1.0, 1e-6])


def test_each_pass_is_another_permutation_of_all_documents():
    order = SetOrder([5, 3, 7, 1], "seed", 0)
    passes = [[order.index(p * 16 + n) for n in range(16)] for p in range(3)]
    for permutation in passes:
        assert sorted(permutation) == list(range(16))
    assert passes[0] != passes[1] != passes[2]


def test_seeking_needs_no_history():
    sizes = [256] * 300 + [17]
    walked = SetOrder(sizes, 1, "a")
    expected = [walked.index(n) for n in range(80_000)]
    for position in (79_999, 0, 40_000, 76_816, 76_817, 123):
        assert SetOrder(sizes, 1, "a").index(position) == expected[position]


def test_reads_are_local():
    """Within one window only its own row groups are touched."""
    order = SetOrder([256] * 1000, 3)
    groups = {order.index(n) // 256 for n in range(64 * 256)}
    assert len(groups) == 64


def test_steps_hold_exactly_their_documents_and_no_document_twice_in_a_pass():
    sets = [SetOrder([50] * 4, 0), SetOrder([30] * 2, 1)]
    order = MixtureOrder([0.75, 0.25], sets, 16)
    served = [slot for step in range(15) for slot in order.documents(step)]
    assert len(served) == 240
    first = [slot.document for slot in served if slot.part == 0]
    assert len(first) == 180
    assert len(set(first)) == 180
    assert order.served(15) == [180, 60]
    fresh = MixtureOrder([0.75, 0.25], [SetOrder([50] * 4, 0), SetOrder([30] * 2, 1)], 16)
    assert fresh.documents(14) == served[14 * 16 :]


@pytest.mark.parametrize(
    ("sizes", "weights", "passes"),
    [([40, 160], [0.5, 0.5], [2.5, 0.625]), ([30, 10, 400], [0.3, 0.2, 0.5], [2.0, 4.0, 0.25])],
)
def test_a_small_set_is_repeated_and_a_large_one_read_in_part(sizes, weights, passes):
    """200 documents: how often each document of a set is served differs by one at most."""
    order = MixtureOrder(weights, [SetOrder([10] * (size // 10), number) for number, size in enumerate(sizes)], 10)
    served = [slot for step in range(20) for slot in order.documents(step)]
    for part, (size, expected) in enumerate(zip(sizes, passes, strict=True)):
        times = np.bincount([slot.document for slot in served if slot.part == part], minlength=size)
        assert times.sum() / size == expected
        assert set(times) == {int(np.floor(expected)), int(np.ceil(expected))}


def test_an_empty_set_is_an_error():
    with pytest.raises(ConfigError, match="no usable document"):
        SetOrder([], "x")
