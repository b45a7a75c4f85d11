"""How far a program has come, for others to read while it runs. Nothing depends on it, and no two runs write the same.

A training run writes `progress.json` into its run folder; a job over shards writes one beside the lock under which its
folder is written, and removes it when the manifest stands. It says nothing of whether the program lives: the lock does.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unifork.errors import UniForkError
from unifork.processes import lock_path
from unifork.shards.manifest import write_json

PROGRESS = "progress.json"


def places(folder: Path) -> list[tuple[Path, Path]]:
    """The locks under which a job's folder may be written, its own and its parent's, each with what lies beside it."""
    folder = folder.absolute()
    parent, name = folder.parent, folder.name
    beside = [folder.with_name(f"{name}.{PROGRESS}"), parent.with_name(f"{parent.name}.{name}.{PROGRESS}")]
    return list(zip(map(lock_path, (folder, parent)), beside, strict=True))


def write_progress(path: Path, **facts: Any) -> None:
    """Say how far a program is, and when. Raises MachineError where the disk takes nothing more."""
    write_json(path, {**facts, "written": time.time()})


def read_progress(*paths: Path) -> dict[str, Any]:
    """What the first of some files says; nothing where none can be read."""
    for path in paths:
        with suppress(OSError, ValueError):
            return dict(json.loads(path.read_text()))
    return {}


@contextmanager
def stop_noted(*paths: Path) -> Iterator[None]:
    """Write why the block was left by an exception beside the progress that is there, where that is possible."""
    try:
        yield
    except BaseException as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        for path in paths:
            with suppress(OSError, UniForkError):
                if found := read_progress(path):
                    write_json(path, {**found, "stopped": reason})
        raise
