"""What a run folder is worth at a start: which checkpoint training goes on from, and what is in the way of it.

Nothing is believed that is not whole: `state.json` has a hash of itself and of every file beside it, its counts must be
those of the stage's order, and `history.jsonl` becomes what it was at the checkpoint. Whatever is repaired is one line.
"""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unifork.config import fingerprint
from unifork.errors import CheckpointError
from unifork.shards.manifest import TEMPORARY, write_atomically
from unifork.training.checkpoint import (
    FORMAT,
    HASH,
    LATEST,
    STATE,
    is_intact,
    latest,
    read_state,
    step_folders,
    written_file,
)
from unifork.training.history import FILE, Log, read
from unifork.weights import LISTED, read_json


def settle(folder: Path, mark: str, order: Sequence[str], log: Log) -> None:
    """Have `latest` name a whole checkpoint of this configuration, or nothing be there. For one worker of all.

    mark: fingerprint of the configuration; a run of another one is moved aside. order: the track of every step of the
    stage. Raises CheckpointError where checkpoints lie there and none of them is whole.
    """
    for path in [*folder.glob(".step-*.tmp"), *folder.glob(f".*{TEMPORARY}*")]:  # of an attempt that was killed
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pointer, found = folder / LATEST, step_folders(folder)[::-1]
    named = pointer.read_text(errors="replace").strip() if pointer.exists() else None
    problems, names = [], [path.name for path in found]
    if named is None and not found:
        return
    if named not in names:
        what = "is missing" if named is None else f"names {named!r:.80}, which is not there"
        problems.append(f"{pointer} {what}")
    for path in found[names.index(named) if named in names else 0 :]:
        try:
            plain = read_state(path)
            if reason := _foreign(plain, mark):
                aside = set_aside(folder)
                log(f"{folder.name} {reason}; moved to {aside.name}, starting afresh")
                return
            check_whole(path, plain, order)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            break
    else:
        raise CheckpointError(
            f"{folder}: no whole checkpoint to continue from: {'; '.join(problems)}. Delete the folder to start afresh"
        )
    if problems:
        log(f"{'; '.join(problems)}. Continuing from the newest whole checkpoint, {path.name}")
        write_atomically(pointer, lambda temporary: temporary.write_text(path.name))
    if above := found[: found.index(path)]:
        moved = [set_aside(newer, f".{newer.name}").name for newer in above]
        log(f"{', '.join(p.name for p in above)} not continued from; moved to {', '.join(moved)}, delete at any time")
    _restore_history(folder, path, log)


def check_extended(folder: Path, order: Sequence[str], summary: Path) -> None:
    """Raise CheckpointError unless the last checkpoint of a finished run is whole and the one of its model.

    order: the track of every step of that run. summary: `training/summary.json` of its model.
    """
    try:
        if (found := latest(folder)) is None:
            raise CheckpointError(f"{folder}: no checkpoint there")
        path, plain = found
        check_whole(path, plain, order)
        if path.name != f"step-{len(order)}" or fingerprint(read(path)) != read_json(summary).get("history"):
            raise CheckpointError(f"{path}: not the end of the run that {summary.parent.parent} was made by")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Extending a stage needs the optimizer state at its end, which DVC does not keep: bring the "
            f"folder from where the stage was trained, or train it again: dvc repro --force --single-item "
            f"train@{folder.name}"
        ) from None


def set_aside(folder: Path, name: str = "") -> Path:
    """Move a folder out of the way, to `<name>.old-N`, by default its own name; nothing is deleted."""
    number = 1
    while (target := folder.with_name(f"{name or folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def _foreign(plain: dict[str, Any], mark: str) -> str | None:
    """Why a state belongs to another run, in words; None where it does not, or is damaged."""
    if not is_intact(plain) and (HASH in plain or not isinstance(plain.get("format"), int)):
        return None
    if plain["format"] != FORMAT:  # those before 3 had no hash
        return f"holds checkpoints of another format ({plain['format']} instead of {FORMAT})"
    if plain.get("fingerprint") != mark:
        return "belongs to another configuration, start model, data or version of the code"
    return None


def check_whole(path: Path, plain: dict[str, Any], order: Sequence[str]) -> None:
    """Raise CheckpointError where anything of a checkpoint is not as it was written. plain: its state."""
    place, number = path / STATE, int(path.name.removeprefix("step-"))
    if number > len(order):
        raise CheckpointError(f"{path}: the stage has {len(order)} steps; was the folder renamed?")
    expected = {**dict.fromkeys(order, 0), **Counter(order[:number])}
    if (steps := plain.get("steps")) != expected:
        raise CheckpointError(f"{place}: steps {steps!r:.80}; after {number} of {len(order)} they are {expected}")
    if not is_intact(plain):
        raise CheckpointError(f"{place}: does not fit its own hash; it was damaged or edited")
    files = plain["files"]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing lets other threads run
        written = threads.map(lambda name: written_file(path / name), files)
        wrong = [
            f"{path / name}: missing" if now is None else
            f"{path / name}: {now['bytes']} bytes instead of {files[name]['bytes']}"
            if now["bytes"] != files[name]["bytes"] else f"{path / name}: not the bytes that were written (blake2b)"
            for name, now in zip(files, written, strict=True) if now != files[name]
        ]  # fmt: skip
    if wrong:
        raise CheckpointError("; ".join(wrong[:LISTED]))


def _restore_history(folder: Path, path: Path, log: Log) -> None:
    """Have the history end with a checkpoint, which holds a copy of it."""
    history, record = folder / FILE, (path / FILE).read_bytes()
    now = history.read_bytes() if history.exists() else b""
    if not now.startswith(record):
        log(f"{history} lacked steps of {path.name} or had other ones; restored from the copy in it")
    if now != record:
        write_atomically(history, lambda temporary: temporary.write_bytes(record))
