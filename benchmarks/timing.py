"""What the benchmarks share: alternating pairs, median ratios with an interval, what the machine is.

Two ways are timed in turns within one process, so that whatever else the machine does meets both.
The ratio of a pair is taken pair by pair, and its interval is that of the median under resampling.
"""

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Self

import numpy as np
import torch

RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """A median with its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interval(values: Sequence[float]) -> Ratio:
    """Median of `values` and the 95 % percentile bootstrap interval of the median."""
    array = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.percentile(np.median(array[picks], 1), [2.5, 97.5])
    return Ratio(float(np.median(array)), float(low), float(high))


def clock(device: str) -> float:
    """Seconds: processor time of this process on a CPU, wall time behind a synchronization elsewhere.

    Processor time does not count what other programs on a shared machine take.
    """
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def alternate(ways: Mapping[str, Callable[[], object]], pairs: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call: one warm-up each, then all ways in turns, `pairs` times, in changing order."""
    names = list(ways)
    for name in names:
        ways[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(pairs):
        for name in names if number % 2 == 0 else reversed(names):
            started = clock(device)
            ways[name]()
            seconds[name].append(clock(device) - started)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """How many times faster the second is, pair by pair."""
    return interval([a / b for a, b in zip(slow, fast, strict=True)])


class Meter:
    """Seconds of wall and processor time of a block, with those of all processes below this one.

    What processes used is read from /proc four times a second, so what one does in its last quarter of a second
    is not counted. Of a Ray of this process that includes its daemons (GCS, raylet, agents), idle or not.
    `peaks` is the most MiB that each process held, by its number.
    """

    def __enter__(self) -> Self:
        self.wall, self._stopped = time.perf_counter(), threading.Event()
        self._before, self._seen, self.peaks = _processor_seconds(), {}, {}
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self.wall
        self._stopped.set()
        self._thread.join()
        self.cpu = sum(used - self._before.get(process, 0.0) for process, used in self._seen.items())

    def _watch(self) -> None:
        while not self._stopped.wait(0.25):
            self._look()
        self._look()

    def _look(self) -> None:
        self._seen |= _processor_seconds()
        self.peaks |= _peaks(number for number, _ in self._seen)


def _peaks(processes: Iterable[int]) -> dict[int, float]:
    """MiB that processes which still run held at most."""
    found = {}
    for number in processes:
        try:
            text = Path(f"/proc/{number}/status").read_text()
        except OSError:  # it has ended
            continue
        lines = dict(line.split(":", 1) for line in text.splitlines())
        found[number] = int(lines.get("VmHWM", "0").split()[0]) / 1024
    return found


def _processor_seconds() -> dict[tuple[int, str], float]:
    """Processor seconds of this process and of those below it, by number and start."""
    parents, used = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        number = int(file.parent.name)
        parents[number] = int(fields[1])
        used[number, fields[19]] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    below = {os.getpid()}
    while more := {number for number, parent in parents.items() if parent in below} - below:
        below |= more
    return {process: seconds for process, seconds in used.items() if process[0] in below}


def machine(device: str) -> str:
    """One line: processor or accelerator, threads, versions, date."""
    if device == "cpu":
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
        name = names[0] if names else platform.processor()
        what = f"{name}, {os.cpu_count()} cores, threads used: {torch.get_num_threads()}"
    else:
        what = torch.cuda.get_device_name()
    return f"{what}; torch {torch.__version__}; {date.today().isoformat()}"


def in_a_new_process(program: str, *arguments: str) -> str:
    """Standard output of a Python program; a new process has a peak memory of its own."""
    done = subprocess.run([sys.executable, program, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
