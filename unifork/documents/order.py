"""Which documents belong to a step, and in which rows.

The documents are a pure function of (seed, mixture, step), with O(1) seek.

Slots are assigned to the data sets by a fixed schedule that keeps every prefix within one document of
the exact weights. The n-th slot of a set maps to (pass, index): each pass has its own permutation,
keyed by (seed, set, pass), of row groups first and then of documents inside windows of row groups,
so memory is flat and reads are local. Nothing there knows workers, packing or history.

Then documents become rows, and rows go to workers: a pure function of lengths and tasks, first fit and longest first,
task by task, so that the documents of a task are neighbours and a task route is two slices. Rows are made as many as
the workers' microbatches hold, and as short as that allows: an empty row costs as much as a full one, and a step
rarely fills its last rows. Packing decides the speed of a step and nothing else.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from unifork.errors import ConfigError
from unifork.randomness import keyed
from unifork.vocabulary import TASKS, Task

WINDOW_GROUPS = 64
"""Row groups shuffled together; with 256 rows a group, documents mix over 16,384 rows."""

MOST_SLOTS, BLOCK_SLOTS = 100_000, 4096
"""The longest period that is laid out whole, and the least slots of a block."""
LEAST_SHARE = Fraction(1, 1_000_000)
"""A smaller part of a mixture would make blocks that take seconds to lay out, for a document in a million."""


class Slot(NamedTuple):
    """One document of a step: which part of the mixture, which document of it."""

    part: int
    document: int


class SetOrder:
    """The endless order of one data set, by position."""

    def __init__(self, group_sizes: Sequence[int] | np.ndarray, *keys: object) -> None:
        """group_sizes: usable documents per row group, in file order."""
        self.sizes = np.array(group_sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)
        self.keys = keys
        self.total = int(self.sizes.sum())
        if not self.total:
            raise ConfigError(f"{keys}: no usable document in this part of the mixture")
        self._pass = lru_cache(maxsize=2)(self._groups_of_pass)
        self._window = lru_cache(maxsize=4)(self._documents_of_window)

    def index(self, position: int) -> int:
        """The document at a position; positions beyond the last document begin another pass."""
        number, offset = divmod(position, self.total)
        _, ends = self._pass(number)
        window = int(np.searchsorted(ends, offset, side="right"))
        before = int(ends[window - 1]) if window else 0
        return int(self._window(number, window)[offset - before])

    def _groups_of_pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        groups = keyed(*self.keys, number).permutation(len(self.sizes))
        counts = np.add.reduceat(self.sizes[groups], np.arange(0, len(groups), WINDOW_GROUPS))
        return groups, np.cumsum(counts)

    def _documents_of_window(self, number: int, window: int) -> np.ndarray:
        groups = self._pass(number)[0][window * WINDOW_GROUPS : (window + 1) * WINDOW_GROUPS]
        documents = np.concatenate([np.arange(self.starts[g], self.starts[g] + self.sizes[g]) for g in groups])
        return keyed(*self.keys, number, window).permutation(documents)


class Schedule:
    """Which part of a mixture each slot of a track belongs to: an endless sequence with an exact share for each part.

    After any number of slots every part is within one document of its exact share: the (j+1)-th document of a part
    with share s has the slots from floor(j/s) to ceil((j+1)/s) - 1, and at every slot, of the documents whose first
    slot has come, the one whose end is nearest is served (Bresenham's idea for many parts).

    A slot is found through its block: some periods of the shares, or, where one is too long to be laid out, at least as
    many slots as the smallest part needs for one document. How many documents of each part stand before a block follows
    from its number alone (`before`), in such a way that every block can be filled.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: as decimal fractions, which are never rounded. Raises ConfigError for a share below LEAST_SHARE."""
        exact = [Fraction(str(weight)) for weight in weights]
        shares = [weight / sum(exact) for weight in exact]
        if min(shares) < LEAST_SHARE:
            raise ConfigError(
                f"mixture weights {list(weights)}: {weights[shares.index(min(shares))]} is a share below one document "
                f"in {1 / LEAST_SHARE}; raise it or leave it out"
            )
        self.period = math.lcm(*(share.denominator for share in shares))
        self.counts = [int(share * self.period) for share in shares]
        """Documents of each part in a period."""
        self.repeats = self.period <= MOST_SLOTS
        least = -(-self.period // min(self.counts))
        self.block_slots = self.period * -(-BLOCK_SLOTS // self.period) if self.repeats else max(BLOCK_SLOTS, least)
        self._before, self._laid_out = lru_cache(maxsize=4)(self.before), lru_cache(maxsize=2)(self._lay_out)

    def slot(self, slot: int) -> tuple[int, int]:
        """(part, how many of its documents were served before) of a slot."""
        number, offset = divmod(slot, self.block_slots)
        parts, ranks = self._laid_out(0 if self.repeats else number)
        part = int(parts[offset])
        return part, self._before(slot - offset)[part] + int(ranks[offset])

    def served(self, slots: int) -> list[int]:
        """Documents of each part in the first `slots` slots."""
        number, offset = divmod(slots, self.block_slots)
        parts, _ = self._laid_out(0 if self.repeats else number)
        counts = np.bincount(parts[:offset], minlength=len(self.counts))
        return [int(count) for count in self._before(slots - offset) + counts]

    def before(self, slot: int) -> list[int]:
        """Documents of each part before a slot at which a block begins: its exact share, rounded down or up.

        The border splits one document of every part whose share is no whole number there. Each of these must get a
        place in one of the two blocks. In the earlier block only so many places are left near its end (the sum of
        the fractions up to there) that the documents that have just begun cannot all stand in it; in the later one
        the same holds for those that are about to end. With places numbered from the border in both directions, each
        document may have the places of an interval around it, and the most urgent first fills them all: the fractions
        show that a matching exists.
        """
        served, open_fractions = zip(*(divmod(slot * count, self.period) for count in self.counts), strict=True)
        split = {part: fraction for part, fraction in enumerate(open_fractions) if fraction}
        begun = self._summed(split, lambda part: Fraction(split[part], self.counts[part]))
        rest = {part: self.period - fraction for part, fraction in split.items()}
        left = self._summed(rest, lambda part: Fraction(rest[part], self.counts[part]))
        before, ready = list(served), list[tuple[int, int]]()
        youngest_last = sorted(split, key=lambda part: begun[part])
        for place in range(slot - sum(served), 0, -1):
            while youngest_last and begun[youngest_last[-1]] >= place:
                part = youngest_last.pop()
                heapq.heappush(ready, (left[part], part))
            before[heapq.heappop(ready)[1]] += 1
        return before

    def _summed(self, fractions: dict[int, int], order: Callable[[int], Fraction]) -> dict[int, int]:
        """Part: the sum of the fractions up to its own in an order of the parts, rounded up."""
        parts = sorted(fractions, key=lambda part: (order(part), part))
        sums = accumulate(fractions[part] for part in parts)
        return {part: -(-total // self.period) for part, total in zip(parts, sums, strict=True)}

    def _lay_out(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Part of each slot of a block, and how many documents of that part stand before it in the block."""
        first = number * self.block_slots
        stop = first + self.block_slots
        before, ends = self.before(first), self.before(stop)
        parts, ranks = np.empty(self.block_slots, np.int32), np.empty(self.block_slots, np.int32)
        waiting = [(served * self.period // self.counts[part], part, served) for part, served in enumerate(before)]
        waiting = [entry for entry in waiting if entry[2] < ends[entry[1]]]
        heapq.heapify(waiting)
        ready: list[tuple[int, float, int, int]] = []
        for slot in range(first, stop):
            while waiting and waiting[0][0] <= slot:
                _, part, served = heapq.heappop(waiting)
                last = min(-(-(served + 1) * self.period // self.counts[part]), stop)
                heapq.heappush(ready, (last, (served + 1) / self.counts[part], part, served))
            _, _, part, served = heapq.heappop(ready)
            parts[slot - first], ranks[slot - first] = part, served - before[part]
            if served + 1 < ends[part]:
                heapq.heappush(waiting, ((served + 1) * self.period // self.counts[part], part, served + 1))
        return parts, ranks


class MixtureOrder:
    """The documents of every step of a track."""

    def __init__(self, weights: Sequence[float], sets: list[SetOrder], batch_documents: int) -> None:
        self.sets, self.batch_documents, self.schedule = sets, batch_documents, Schedule(weights)

    def documents(self, step: int) -> list[Slot]:
        """Exactly `batch_documents` documents."""
        first = step * self.batch_documents
        return [self.document(slot) for slot in range(first, first + self.batch_documents)]

    def document(self, slot: int) -> Slot:
        """The document in a slot, counted over the whole track."""
        part, position = self.schedule.slot(slot)
        return Slot(part, self.sets[part].index(position))

    def served(self, steps: int) -> list[int]:
        """Documents of each part in the first `steps` steps."""
        return self.schedule.served(steps * self.batch_documents)


# ------------------------------------------------------------------------------------------- packing

LENGTHS = 256
"""Rows of a step are a multiple of 1/256 of `row_tokens` long: steps share lengths (5 to 9 in 20 steps of 384
documents), and rounding up costs little where many workers make rows short."""


@dataclass(frozen=True)
class Packing:
    """Rows of document numbers, all of the same length in tokens; some may be empty."""

    rows: list[list[int]]
    row_tokens: int
    fill: float
    """Share of the rows' tokens that belong to documents, empty rows included."""


def pack_step(lengths: list[int], tasks: list[Task], row_tokens: int, multiple: int = 1) -> Packing:
    """Pack documents into rows of at most `row_tokens`; the number of rows is a multiple of `multiple`.

    No document is split, every document is in exactly one row. Raises ConfigError when a document
    is longer than a row.
    """
    longest = max(lengths, default=0)
    if longest > row_tokens:
        raise ConfigError(
            f"row_tokens is {row_tokens}, but a document of this step has {longest} tokens; "
            f"raise row_tokens in the cluster file to at least the stage's context"
        )
    by_task = [sorted((n for n in range(len(lengths)) if tasks[n] == t), key=lambda n: (-lengths[n], n)) for t in TASKS]
    rows = _first_fit(by_task, lengths, row_tokens)
    count = -(-max(len(rows), 1) // multiple) * multiple
    unit = -(-row_tokens // LENGTHS)
    least = max(longest, -(-sum(lengths) // count), 1)
    for shorter in range(-(-least // unit) * unit, row_tokens, unit):
        found = _first_fit(by_task, lengths, shorter)
        if len(found) <= count:
            rows, row_tokens = found, shorter
            break
    rows += [[]] * (count - len(rows))
    return Packing(rows, row_tokens, sum(lengths) / (count * row_tokens))


def _first_fit(by_task: list[list[int]], lengths: list[int], row_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[int] = []
    for numbers in by_task:
        # of the earlier task's rows only the last one is shared, so at most one row is mixed
        first = max(len(rows) - 1, 0)
        for number in numbers:
            for row in range(first, len(rows)):
                if free[row] >= lengths[number]:
                    break
            else:
                row = len(rows)
                rows.append([])
                free.append(row_tokens)
            rows[row].append(number)
            free[row] -= lengths[number]
    return rows


def assign_rows_to_workers(
    rows: list[list[int]], workers: int, rows_per_microbatch: int
) -> list[list[list[list[int]]]]:
    """[worker][microbatch][row] -> document numbers.

    Every worker gets the same number of microbatches of the same number of rows. Raises ValueError
    when the rows do not come out even, which is an error of the caller.
    """
    if len(rows) % (workers * rows_per_microbatch):
        raise ValueError(f"{len(rows)} rows for {workers} workers with {rows_per_microbatch} rows at once")
    return [
        [own_rows[first : first + rows_per_microbatch] for first in range(0, len(own_rows), rows_per_microbatch)]
        for own_rows in (rows[worker::workers] for worker in range(workers))
    ]
