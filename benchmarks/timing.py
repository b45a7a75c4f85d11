"""What the benchmarks share: alternating pairs, median ratios with an interval, what the machine is.

Two ways are timed in turns within one process, so that whatever else the machine does meets both.
The ratio of a pair is taken pair by pair, and its interval is that of the median under resampling.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

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
    """Seconds: processor time of this process on a CPU, wall time behind a synchronisation elsewhere.

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
