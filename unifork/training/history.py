"""What happened at each step, on disk while it happens.

`history.jsonl` has one line per step and survives a kill: on resume the lines after the checkpoint
are cut, so the file never shows a step twice. Everything in it is reproducible; rates and clocks
go to the progress line only.
"""

import csv
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

FILE = "history.jsonl"
BOARD = "tensorboard"


class History:
    """The record of a run; one process writes it: `history.jsonl`, and the same numbers for TensorBoard."""

    def __init__(self, folder: Path, finished: int) -> None:
        """finished: steps (of all tracks) that the checkpoint already holds."""
        self.path = folder / FILE
        kept = read(folder)[:finished]
        with open(self.path, "w") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in kept)
            handle.flush()
            os.fsync(handle.fileno())
        self._handle = open(self.path, "a")  # noqa: SIM115 - lives as long as the run
        self._done = len(kept)
        # what an attempt before this one wrote after the checkpoint is hidden
        self._board = SummaryWriter(str(folder / BOARD), purge_step=len(kept) + 1)

    def add(self, row: dict[str, Any]) -> None:
        """One step."""
        self._handle.write(json.dumps(row) + "\n")
        self._handle.flush()
        self._done += 1
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(f"{row['track']}/{name}", value, self._done)

    def sync(self) -> None:
        """Bring every step so far to the disk; a checkpoint must not know steps that the history does not."""
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """No more steps."""
        self._handle.close()
        self._board.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The steps recorded so far; a line that a kill cut short is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_csv(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """The steps as a table that DVC and spreadsheets plot; missing values are empty."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


LOG = "log.txt"


class Log:
    """Lines for people, in `log.txt` of the run folder; whoever launched the run shows them."""

    def __init__(self, folder: Path, title: str) -> None:
        self.path, self.title = folder / LOG, title

    def __call__(self, text: str) -> None:
        """Write a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as handle:
            handle.write(f"{self.title}: {text}\n")


class Progress:
    """A line every few seconds: steps done of steps known, losses, rate and ETA."""

    def __init__(self, log: Log, done: int, total: int, every_seconds: float = 10.0) -> None:
        self.log, self.done, self.first, self.total, self.every = log, done, done, total, every_seconds
        self.started = self.shown = time.monotonic()

    def show(self, row: dict[str, Any], documents: int) -> None:
        """One more step; write the line if it is time for one, and always at the end."""
        self.done, now = self.done + 1, time.monotonic()
        if self.done < self.total and now - self.shown < self.every:
            return
        self.shown = now
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        losses = "  ".join(
            f"{name} {row[name]:.3f}" for name in ("text_loss", "image_loss") if row.get(name) is not None
        )
        eta = f"  {(self.total - self.done) / rate:.0f} s to go" if self.done < self.total else ""
        self.log(
            f"step {self.done}/{self.total} [{row['track']}]  {losses}  "
            f"lr {row['learning_rate']:.2e}  fill {row['fill']:.2f}  "
            f"{rate * documents:.0f} documents/s  {rate * row['tokens']:.0f} tokens/s{eta}"
        )
