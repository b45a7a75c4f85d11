"""What happened at each step, on disk while it happens.

`history.jsonl` has one line per step and survives a kill: on resume it becomes what it was at the
checkpoint, so the file never shows a step twice. Everything in it is reproducible; rates and clocks
go to the progress line, `progress.json` and `rates.jsonl`. Nothing on this disk is written by a thread:
one that is full is an error at once.
"""

import csv
import json
import os
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from unifork.errors import writing
from unifork.shards.manifest import write_atomically
from unifork.shards.progress import PROGRESS, write_progress
from unifork.training.loggers import Logger
from unifork.training.tables import Rate

FILE, VALIDATION = "history.jsonl", "validation.jsonl"


class History:
    """The record of a run; one process writes it: `history.jsonl`, `validation.jsonl`, and both for its loggers.

    Raises MachineError where the disk takes nothing more.
    """

    def __init__(self, folder: Path, finished: int, log: "Log", loggers: Iterable[type[Logger]] = ()) -> None:
        """finished: steps (of all tracks) that the file holds; without any it begins anew."""
        self.path, self.validation, self._done = folder / FILE, folder / VALIDATION, finished
        with writing(self.path):
            self._handle = open(self.path, "a" if finished else "w")  # noqa: SIM115 - lives as long as the run
            kept = [row for row in read(folder, VALIDATION) if row["finished_steps"] < finished]  # the rest comes again
            write_atomically(self.validation, lambda path: path.write_text("".join(map(_line, kept))))
            self._loggers = [logger(folder, finished, log) for logger in loggers]

    def add(self, row: dict[str, Any]) -> None:
        """One step."""
        self._done += 1
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        numbers = {f"{row['track']}/{name}": value for name, value in numbers.items()}
        with writing(self.path):
            self._handle.write(_line(row))
            self._handle.flush()
            for logger in self._loggers:
                logger.add(self._done, numbers)

    def add_validation(self, rows: Sequence[dict[str, Any]]) -> None:
        """The losses of every part of the mixtures on its held-out documents."""
        with writing(self.validation), open(self.validation, "a") as handle:
            handle.write("".join(map(_line, rows)))
            for row in rows:
                place = f"validation/{row['track']}/{row['part']}"
                losses = {
                    f"{place}/{name}": value for name, value in row.items() if "loss" in name and value is not None
                }
                for logger in self._loggers:
                    logger.add(row["finished_steps"], losses)

    def sync(self) -> None:
        """Bring every step so far to the disk; a checkpoint must not know steps that the history does not."""
        with writing(self.path):
            os.fsync(self._handle.fileno())
            for logger in self._loggers:
                logger.sync()

    def close(self) -> None:
        """No more steps. What was not synced may be lost."""
        for close in (self._handle.close, *[logger.close for logger in self._loggers]):
            with suppress(OSError):
                close()


def _line(row: Mapping[str, Any]) -> str:
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


RATES, POINTS = "rates.jsonl", 200
"""A file of the run folder, and how many rows a run writes there in about all."""


class Rates:
    """The speed of a run in `rates.jsonl`; like the history it becomes on resume what it was at the checkpoint."""

    def __init__(self, folder: Path, finished: int, total: int, device: str = "cpu") -> None:
        self.path, self.device, self.every = folder / RATES, torch.device(device), max(1, total // POINTS)
        self.documents, self.tokens, self.since = 0, 0, time.monotonic()
        kept = [row for row in read(folder, RATES) if row["finished_steps"] <= finished]
        with writing(self.path):
            write_atomically(self.path, lambda path: path.write_text("".join(map(_line, kept))))

    def add(self, finished: int, tokens: int, documents: int) -> None:
        """One more step. Raises MachineError where the disk takes nothing more."""
        self.documents, self.tokens = self.documents + documents, self.tokens + tokens
        if finished % self.every:
            return
        now = time.monotonic()
        seconds = max(now - self.since, 1e-9)
        row: Rate = {
            "finished_steps": finished, "documents_per_second": self.documents / seconds,
            "tokens_per_second": self.tokens / seconds, "memory_gib": peak_memory(self.device) / 2**30,
        }  # fmt: skip
        with writing(self.path), open(self.path, "a") as handle:
            handle.write(_line(row))
        self.documents, self.tokens, self.since = 0, 0, now


class Progress:
    """A line every few seconds, and the same in `progress.json`: steps done, losses, rate, ETA, peak memory, MFU."""

    def __init__(self, log: Log, done: int, total: int, device: str = "cpu", every_seconds: float = 10.0) -> None:
        self.log, self.done, self.first, self.total, self.every = log, done, done, total, every_seconds
        self.device = torch.device(device)
        self.token_shares: Mapping[str, float] = {}
        """Of the peak of all workers' chips that one token a second of a track is; without it no MFU is shown."""
        self.losses: dict[str, float] = {}
        self.started = self.shown = time.monotonic()

    def show(self, row: dict[str, Any], documents: int) -> None:
        """One more step; write the line if it is time for one, and always at the end."""
        self.done, now = self.done + 1, time.monotonic()
        self.losses |= {name: row[name] for name in ("text_loss", "image_loss") if row.get(name) is not None}
        if self.done < self.total and now - self.shown < self.every:
            return
        self.shown = now
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        tokens, share = rate * row["tokens"], self.token_shares.get(row["track"])
        facts = {
            "track": row["track"], "fill": row["fill"], "learning_rate": row["learning_rate"], **self.losses,
            "documents_per_second": rate * documents, "tokens_per_second": tokens, "mfu": share and share * tokens,
            "seconds_left": (self.total - self.done) / rate, "memory_gib": peak_memory(self.device) / 2**30,
        }  # fmt: skip
        self.write(**facts)
        losses = "  ".join(f"{name} {value:.3f}" for name, value in self.losses.items() if row[name] is not None)
        mfu = f"  MFU {facts['mfu']:.1%}" if share else ""
        eta = f"  {facts['seconds_left']:.0f} s to go" if self.done < self.total else ""
        self.log(
            f"step {self.done}/{self.total} [{row['track']}]  {losses}  "
            f"lr {row['learning_rate']:.2e}  fill {row['fill']:.2f}  {facts['documents_per_second']:.0f} documents/s  "
            f"{tokens:.0f} tokens/s  memory {facts['memory_gib']:.2f} GiB{mfu}{eta}"
        )

    def write(self, **facts: Any) -> None:
        """Put `progress.json` into the run folder. Raises MachineError where the disk takes nothing more."""
        write_progress(self.log.path.with_name(PROGRESS), done=self.done, total=self.total, **facts)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU; on a CPU, that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
