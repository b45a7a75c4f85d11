"""`unifork status`: how the runs of this folder are, from their files alone."""

import fcntl
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from unifork.layout import Layout
from unifork.processes import lock_path

COLUMNS = ("run", "state", "step", "text", "image", "fill", "rate", "left", "checkpoint")
_TOTAL = re.compile(r"(?:starting, |step \d+ of |step \d+/)(\d+)")
_RATE = re.compile(r"(\d+ documents/s)  \d+ tokens/s(?:  (\d+) s to go)?")


def status() -> None:
    """Show every run of this folder: step, losses, fill, rate, time left, last checkpoint, and why it stopped.

    Reads files alone, so it works from any terminal or machine that sees the folder, while runs go on.
    """
    rows: list[tuple[str, ...]] = [COLUMNS]
    reasons: list[str] = []
    for log in sorted(Layout().run("").glob("*/log.txt")):
        rows.append(row := _row(log.parent, log.read_text()))
        if row[1] == "stopped":
            with suppress(OSError, ValueError, KeyError):
                log_end = log.read_text().splitlines()[-1].removeprefix(f"{row[0]}: ")
                stopped = log.parent / "stopped.json"
                reasons.append(
                    f"{row[0]}: {json.loads(stopped.read_text())['reason'] if stopped.exists() else log_end}"
                )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print("\n".join(reasons), end="\n" * bool(reasons))


def _row(folder: Path, log: str) -> tuple[str, ...]:
    """The cells of a run; what is not there yet is a dash."""
    history, latest = folder / "history.jsonl", folder / "latest"
    whole = history.read_text().rpartition("\n")[0].splitlines() if history.exists() else []
    step: dict[str, Any] = json.loads(whole[-1]) if whole else {}
    values = [step.get(name) for name in ("text_loss", "image_loss", "fill")]
    running, finished = _is_locked(lock_path(folder)), (folder / "finished.json").exists()
    rate, left = (_RATE.findall(log) or [("-", "")])[-1]
    return (
        folder.name,
        "running" if running else "finished" if finished else "stopped",
        f"{len(whole)}/{(_TOTAL.findall(log) or ['?'])[-1]}",
        *("-" if value is None else f"{value:.3f}" for value in values),
        rate,
        f"{left} s" if left and running else "-",
        latest.read_text() if latest.exists() else "-",
    )


def _is_locked(path: Path) -> bool:
    """Whether a program writes a folder; a lock that was left by a dead one is held by nobody."""
    try:
        with open(path) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
