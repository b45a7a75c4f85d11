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

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from unifork.errors import ConfigError
from unifork.randomness import keyed
from unifork.vocabulary import TASKS, Task

WINDOW_GROUPS = 64
"""Row groups shuffled together; with 256 rows a group, documents mix over 16,384 rows."""

MAX_PERIOD = 100_000
"""Longest schedule; weights are rounded to fractions that fit."""


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


def schedule(weights: list[float]) -> np.ndarray:
    """Which part each slot of one period belongs to.

    At every slot the part that is furthest behind its weight is served, so that after any number
    of slots each part is within one of its exact share (Bresenham's idea for many parts).
    """
    total = sum(Fraction(str(weight)) for weight in weights)
    shares = [(Fraction(str(weight)) / total).limit_denominator(1000) for weight in weights]
    shares[shares.index(max(shares))] += 1 - sum(shares)
    period = int(np.lcm.reduce([share.denominator for share in shares]))
    if period > MAX_PERIOD:
        shares = [Fraction(round(share * 1000), 1000) for share in shares]
        shares[shares.index(max(shares))] += 1 - sum(shares)
        period = 1000
    counts = np.array([int(share * period) for share in shares], np.int64)
    if (counts <= 0).any():
        raise ConfigError(
            f"mixture weights {weights}: a share below 1/1000 cannot be scheduled; raise it or leave it out"
        )
    assigned = np.zeros(len(counts), np.int64)
    slots = np.empty(period, np.int64)
    for slot in range(period):
        behind = counts * (slot + 1) - assigned * period
        # among those that are behind, the one whose next deadline is the earliest
        deadline = np.where(behind > 0, (assigned + 1) / counts, np.inf)
        slots[slot] = int(np.argmin(deadline))
        assigned[slots[slot]] += 1
    return slots


class MixtureOrder:
    """The documents of every step of a track."""

    def __init__(self, weights: list[float], sets: list[SetOrder], batch_documents: int) -> None:
        self.sets, self.batch_documents = sets, batch_documents
        self.slots = schedule(weights)
        self.rank = np.zeros(len(self.slots), np.int64)  # how often the part was served before in the period
        for part in range(len(sets)):
            is_part = self.slots == part
            self.rank[is_part] = np.arange(is_part.sum())
        self.counts = np.bincount(self.slots, minlength=len(sets))

    def documents(self, step: int) -> list[Slot]:
        """Exactly `batch_documents` documents."""
        first = step * self.batch_documents
        return [self.document(slot) for slot in range(first, first + self.batch_documents)]

    def document(self, slot: int) -> Slot:
        """The document in a slot, counted over the whole track."""
        period, offset = divmod(slot, len(self.slots))
        part = int(self.slots[offset])
        position = period * int(self.counts[part]) + int(self.rank[offset])
        return Slot(part, self.sets[part].index(position))

    def served(self, steps: int) -> list[int]:
        """Documents of each part in the first `steps` steps."""
        periods, rest = divmod(steps * self.batch_documents, len(self.slots))
        return [int(n) for n in periods * self.counts + np.bincount(self.slots[:rest], minlength=len(self.sets))]


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
