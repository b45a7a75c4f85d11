"""What is wrong in the folders of finished stages, and taking it away, so that a re-run makes only that again.

In: a folder, or one with such folders below it. Out: one line per fault. Nothing is repaired in place:
a shard is what its stage makes of its input, so the stage makes it again.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from unifork.config import parse
from unifork.errors import UniForkError, writing
from unifork.shards.job import Records, revert_to_records
from unifork.shards.manifest import MANIFEST, RECORD_SUFFIX, RECORDS, TEMPORARY, Manifest, Shard, fault

THREADS = 8
"""Shards that are read at once."""
SHARD_SUFFIXES = (".parquet", ".arrow")


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
    marks = [path for mark in (MANIFEST, RECORDS, "*" + RECORD_SUFFIX) for path in folder.rglob(mark)]
    return sorted({mark.parent for mark in marks})


def faults(folder: Path, threads: int = THREADS) -> list[Damage]:
    """What is wrong in the folder of one job: shards that are missing or damaged, records, files of killed runs.

    Every shard is read; reading and hashing are done in threads, which do not wait for each other.
    """
    shards, found = _known_shards(folder)
    with ThreadPoolExecutor(threads) as pool:
        problems = pool.map(lambda shard: fault(folder, shard), shards.values())
        found += [
            Damage(folder, shard.path, problem, shard)
            for shard, problem in zip(shards.values(), problems, strict=True)
            if problem
        ]
    finished = (folder / MANIFEST).exists() and shards
    for path in folder.iterdir():
        if TEMPORARY in path.name:
            found.append(Damage(folder, path.name, "half written by a killed run"))
        elif finished and path.suffix in SHARD_SUFFIXES and path.name not in shards:
            found.append(Damage(folder, path.name, "named by no manifest"))
    return sorted(found, key=lambda damage: damage.name)


def repair(found: list[Damage]) -> None:
    """Remove the files that are wrong, and the manifest above a shard that is; the next run makes what is missing.

    The manifest becomes records of the shards that are right: whatever else DVC may see of a folder, it sees its
    manifest. Only files of the folders themselves are removed; an object of a store is replaced by the next run.
    """
    for folder in {damage.folder for damage in found if damage.shard}:
        wrong = {damage.name for damage in found if damage.folder == folder}
        shards, _ = _known_shards(folder)
        revert_to_records(folder, [shard for name, shard in shards.items() if name not in wrong])
    for damage in found:
        with writing(damage.folder):
            (damage.folder / damage.name).unlink(missing_ok=True)


def _known_shards(folder: Path) -> tuple[dict[str, Shard], list[Damage]]:
    """The shards that a manifest and records name, by file name, and what is wrong with these files themselves."""
    shards: dict[str, Shard] = {}
    found = []
    if not (folder / MANIFEST).exists():
        found.append(Damage(folder, MANIFEST, "missing: the stage has not finished"))
    kinds: dict[str, type[Manifest | Records]] = {MANIFEST: Manifest, RECORDS: Records}
    for name, kind in kinds.items():
        try:
            if (path := folder / name).exists():
                shards |= {shard.path: shard for shard in parse(kind, json.loads(path.read_text()), str(path)).shards}
        except (UniForkError, ValueError) as error:
            problem = f"damaged ({error}); without it no shard is known to be whole, and all are made again"
            found.append(Damage(folder, name, problem))
    for record in folder.glob("*" + RECORD_SUFFIX):
        try:
            shard = parse(Shard, json.loads(record.read_text()), str(record))
            shards[shard.path] = shard
        except (UniForkError, ValueError):
            found.append(Damage(folder, record.name, "damaged record"))
    return shards, found
