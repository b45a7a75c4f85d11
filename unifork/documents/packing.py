"""Documents of one step -> rows, and rows -> workers. A pure function of lengths and tasks.

First fit, longest first, task by task, so that the documents of a task are neighbours and a task
route is two slices. Rows are then made as many as the workers' microbatches hold, and as short as
that allows: an empty row costs as much as a full one, and a step rarely fills its last rows. Packing
decides the speed of a step and nothing else.
"""

from dataclasses import dataclass

from unifork.errors import ConfigError
from unifork.vocabulary import TASKS, Task

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
    for mine in by_task:
        # of the earlier task's rows only the last one is shared, so at most one row is mixed
        first = max(len(rows) - 1, 0)
        for number in mine:
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


def deal(rows: list[list[int]], workers: int, rows_per_microbatch: int) -> list[list[list[list[int]]]]:
    """[worker][microbatch][row] -> document numbers.

    Every worker gets the same number of microbatches of the same number of rows. Raises ValueError
    when the rows do not come out even, which is an error of the caller.
    """
    if len(rows) % (workers * rows_per_microbatch):
        raise ValueError(f"{len(rows)} rows for {workers} workers with {rows_per_microbatch} rows at once")
    return [
        [mine[first : first + rows_per_microbatch] for first in range(0, len(mine), rows_per_microbatch)]
        for mine in (rows[worker::workers] for worker in range(workers))
    ]
