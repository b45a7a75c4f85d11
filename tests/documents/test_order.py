"""Which documents belong to a step: counts, permutations, seeking."""

from fractions import Fraction

import numpy as np
import pytest

from unifork.documents.loader import MixtureOrder, Schedule, SetOrder
from unifork.errors import ConfigError


def assert_within_one(weights, slots):
    """Every prefix is within one document of the weights, and seeking gives what walking gives."""
    walked, shares = Schedule(weights), np.array(weights) / sum(weights)
    sequence = [walked.slot(number) for number in range(slots)]
    parts, before = np.array(sequence).T
    served = np.cumsum(parts[:, None] == np.arange(len(weights)), axis=0)
    assert (before + 1 == served[np.arange(slots), parts]).all()
    assert (abs(served - shares * np.arange(1, slots + 1)[:, None]) < 1 + 1e-9).all()
    for number in (slots - 1, 0, slots // 2, slots // 3):
        assert Schedule(weights).slot(number) == sequence[number]
    assert Schedule(weights).served(slots) == served[-1].tolist()


@pytest.mark.parametrize(
    "weights",
    [
        [1.0], [0.5, 0.5], [0.6, 0.05, 0.1, 0.25], [1 / 3, 2 / 3], [7.0, 2.0, 2.0], [0.999, 0.001],
        [0.9, 0.0003, 0.0997], [2.0, 1e-4], [0.45, 0.4499999, *[0.00013 * n for n in range(1, 40)]],
    ],
)  # fmt: skip
def test_every_prefix_is_within_one_document_of_the_weights(weights):
    assert_within_one(weights, 12_000)


@pytest.mark.slow
def test_so_is_every_prefix_of_mixtures_that_nobody_chose():
    rng = np.random.default_rng(0)
    for parts in (2, 3, 5, 9, 40, 300):
        assert_within_one((10.0 ** rng.uniform(-1.5, 0, parts)).tolist(), 9_000)
        assert_within_one(rng.uniform(0.9, 1, parts).tolist(), 9_000)


def test_seeking_far_into_a_long_period_is_exact():
    weights = [0.9, 0.0003, 0.05 + 1e-9, 1 / 7]
    order, far = Schedule(weights), 10**11 + 123
    shares = [Fraction(str(weight)) / sum(Fraction(str(each)) for each in weights) for weight in weights]
    for slots in (far, far + 5_000):
        served = order.served(slots)
        assert sum(served) == slots
        assert all(abs(count - share * slots) < 1 for count, share in zip(served, shares, strict=True))
    part, before = order.slot(far)
    assert (before, order.served(far + 1)[part]) == (order.served(far)[part], before + 1)


@pytest.mark.parametrize(
    ("weights", "start"),
    [
        ([0.6, 0.4], "0 1 0 0 1 0 1 0 0 1"),
        ([5.0, 3.0, 2.0], "0 1 0 2 0 1 0 1 0 2"),
        ([0.58, 0.01, 0.06, 0.35], "0 3 0 0 3 0 3 0 0 3"),
    ],
)
def test_the_order_of_earlier_runs_stays(weights, start):
    assert " ".join(str(Schedule(weights).slot(number)[0]) for number in range(10)) == start


def test_a_share_too_small_to_be_scheduled_is_an_error():
    with pytest.raises(ConfigError, match=r"\[1\.0, 1e-07\]: 1e-07 is a share below one document in 1000000"):
        Schedule([1.0, 1e-7])


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
