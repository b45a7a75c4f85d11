"""What is wrong in the folders of finished stages, and taking it away, so that a re-run makes only that again.

In: a folder, or one with such folders below it. Out: one line per fault. Nothing is repaired in place:
a shard is what its stage makes of its input, so the stage makes it again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unifork.config import parse
from unifork.errors import UniForkError, writing
from unifork.layout import STAGE_OF_FOLDER
from unifork.shards.job import revert_to_records
from unifork.shards.manifest import MANIFEST, RECORD_SUFFIX, TEMPORARY, Shard, fault, read_manifest


@dataclass(frozen=True)
class Damage:
    """One file of a folder that is not as it should be."""

    folder: Path
    name: str
    problem: str
    shard: Shard | None = None
    """The shard that is wrong, if it is one."""

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}"


def job_folders(folder: Path) -> list[Path]:
    """The folders at or below one in which a stage has left anything, sorted."""
    marks = [*folder.rglob(MANIFEST), *folder.rglob("*" + RECORD_SUFFIX)]
    return sorted({mark.parent for mark in marks})


def faults(folder: Path) -> list[Damage]:
    """What is wrong in the folder of one job: shards that are missing or damaged, records, files of killed runs."""
    found = [Damage(folder, *problem) for problem in _wrong(folder)]
    return sorted(found, key=lambda damage: damage.name)


def repair(wrong: list[Damage]) -> None:
    """Remove the files that are wrong; the next run of the stage makes what is missing then.

    DVC sees no store, so a manifest that names a wrong object there becomes records of the right ones.
    """
    away = [damage.shard for damage in wrong if damage.shard and damage.shard.uri]
    folders = {damage.folder for damage in wrong if damage.shard in away}
    for folder in folders:
        if (folder / MANIFEST).exists():
            revert_to_records(folder, [shard for shard in read_manifest(folder).shards if shard not in away])
    for damage in wrong:
        with writing(damage.folder):
            (damage.folder / damage.name).unlink(missing_ok=True)
    for shard in away:
        if shard.store and shard.store.size(shard.path) is not None:
            shard.store.remove([shard.path])


def command_for(folder: Path) -> str:
    """What makes the missing shards of a folder again."""
    parts = folder.absolute().parts
    for place, stage in STAGE_OF_FOLDER.items():
        if place in parts[:-1] and parts[parts.index(place) - 1] == "data":
            return f"dvc repro {stage}@{parts[parts.index(place) + 1]}"
    return "the command that wrote the folder"


def _wrong(folder: Path) -> Iterator[tuple[str, str] | tuple[str, str, Shard]]:
    shards: dict[str, Shard] = {}
    finished = (folder / MANIFEST).exists()
    if not finished:
        yield MANIFEST, "missing: the stage has not finished"
    else:
        try:
            shards = {shard.path: shard for shard in read_manifest(folder).shards}
        except UniForkError:
            finished = False
            yield MANIFEST, "damaged; without it no shard is known to be whole, and all are made again"
    for record in sorted(folder.glob("*" + RECORD_SUFFIX)):
        try:
            shard = parse(Shard, json.loads(record.read_text()), str(record))
            shards[shard.path] = shard
        except (UniForkError, ValueError):
            yield record.name, "damaged record"
    for shard in shards.values():
        if problem := fault(folder, shard):
            yield shard.path, problem, shard
    named = {MANIFEST, *shards}
    for path in folder.iterdir():
        if TEMPORARY in path.name:
            yield path.name, "half written by a killed run"
        elif finished and path.suffix == ".parquet" and path.name not in named:
            yield path.name, "named by no manifest"
