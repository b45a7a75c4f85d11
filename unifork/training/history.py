"""What happened at each step, on disk while it happens.

`history.jsonl` has one line per step and survives a kill: on resume it becomes what it was at the
checkpoint, so the file never shows a step twice. Everything in it is reproducible; rates and clocks
go to the progress line only. Nothing is written by a thread: a disk that is full is an error at once.
"""

import csv
import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from unifork.errors import writing
from unifork.shards.manifest import write_atomically

FILE, VALIDATION = "history.jsonl", "validation.jsonl"
BOARD = "tensorboard"


class History:
    """The record of a run; one process writes it: `history.jsonl`, `validation.jsonl`, and both for TensorBoard.

    Raises MachineError where the disk takes nothing more.
    """

    def __init__(self, folder: Path, finished: int) -> None:
        """finished: steps (of all tracks) that the file holds; without any it begins anew."""
        self.path, self.validation, self._done = folder / FILE, folder / VALIDATION, finished
        board = folder / BOARD
        with writing(self.path):
            self._handle = open(self.path, "a" if finished else "w")  # noqa: SIM115 - lives as long as the run
            kept = [row for row in read(folder, VALIDATION) if row["finished_steps"] < finished]  # the rest comes again
            write_atomically(self.validation, lambda path: path.write_text("".join(map(_line, kept))))
            board.mkdir(exist_ok=True)
            self._board = EventsWriter(str(board / "events"), f".{os.getpid()}")
            # what an attempt before this one wrote after the checkpoint is hidden
            self._write_event(step=finished + 1, session_log=SessionLog(status=SessionLog.START))

    def _write_event(self, **content: Any) -> None:
        self._board.write_event(Event(wall_time=time.time(), **content))

    def add(self, row: dict[str, Any]) -> None:
        """One step."""
        self._done += 1
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        with writing(self.path):
            self._handle.write(_line(row))
            self._handle.flush()
            for name, value in numbers.items():
                self._write_event(step=self._done, summary=scalar(f"{row['track']}/{name}", value))

    def add_validation(self, rows: Sequence[dict[str, Any]]) -> None:
        """The losses of every part of the mixtures on its held-out documents."""
        with writing(self.validation), open(self.validation, "a") as handle:
            handle.write("".join(map(_line, rows)))
            for row in rows:
                numbers = {name: value for name, value in row.items() if "loss" in name and value is not None}
                for name, value in numbers.items():
                    tag = f"validation/{row['track']}/{row['part']}/{name}"
                    self._write_event(step=row["finished_steps"], summary=scalar(tag, value))

    def sync(self) -> None:
        """Bring every step so far to the disk; a checkpoint must not know steps that the history does not."""
        with writing(self.path):
            os.fsync(self._handle.fileno())
            self._board.flush()

    def close(self) -> None:
        """No more steps. What was not synced may be lost."""
        for file in (self._handle, self._board):
            with suppress(OSError):
                file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read(folder: Path, name: str = FILE) -> list[dict[str, Any]]:
    """The steps (or validations) recorded so far; a line that a kill cut short is left out."""
    path = folder / name
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
        """Write a line. Raises MachineError where the disk takes nothing more."""
        with writing(self.path):
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


class Startup:
    """Where the seconds between the start of this process and its first new step went."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def mark(self, part: str) -> None:
        """What was done since the mark before, or since the start of the process."""
        self.parts[part] = process_seconds() - sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"first new step {sum(self.parts.values()):.1f} s after the start: {parts}"


def process_seconds() -> float:
    """Seconds since this process began; outside Linux since an arbitrary moment."""
    try:
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        uptime = Path("/proc/uptime").read_text().split()[0]
    except OSError:
        return time.monotonic()
    return float(uptime) - float(ticks) / os.sysconf("SC_CLK_TCK")
