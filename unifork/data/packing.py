"""Documents of one step -> rows, and rows -> workers. A pure function of lengths and tasks.

First fit, longest first, task by task, so that the documents of a task are neighbours and a task
route is two slices. Packing decides the speed of a step and nothing else.
"""

from unifork.errors import ConfigError
from unifork.vocabulary import TASKS, Task


def pack_step(lengths: list[int], tasks: list[Task], row_tokens: int) -> list[list[int]]:
    """Rows of document numbers; no document is split, every document is in exactly one row.

    Raises ConfigError when a document is longer than a row.
    """
    longest = max(lengths, default=0)
    if longest > row_tokens:
        raise ConfigError(
            f"row_tokens is {row_tokens}, but a document of this step has {longest} tokens; "
            f"raise row_tokens in the cluster file to at least the stage's context"
        )
    rows: list[list[int]] = []
    free: list[int] = []
    for task in TASKS:
        mine = sorted((n for n in range(len(lengths)) if tasks[n] == task), key=lambda n: (-lengths[n], n))
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


def fill(rows: list[list[int]], lengths: list[int], row_tokens: int) -> float:
    """Share of the rows' tokens that belong to documents."""
    return sum(lengths) / (len(rows) * row_tokens) if rows else 0.0


def deal(rows: list[list[int]], workers: int, rows_per_microbatch: int) -> list[list[list[list[int]]]]:
    """[worker][microbatch][row] -> document numbers.

    Every worker gets the same number of microbatches of the same number of rows; what is missing
    is filled with empty rows, which are legal and count nothing.
    """
    microbatches = -(-len(rows) // (workers * rows_per_microbatch))
    dealt = []
    for worker in range(workers):
        mine = rows[worker::workers]
        mine = mine + [[]] * (microbatches * rows_per_microbatch - len(mine))
        dealt.append([mine[m * rows_per_microbatch : (m + 1) * rows_per_microbatch] for m in range(microbatches)])
    return dealt
