"""What is wrong in the folders of finished stages, and taking it away, so that a re-run makes only that again.

In: a folder, or one with such folders below it. Out: one line per fault. Nothing is repaired in place:
a shard is what its stage makes of its input, so the stage makes it again.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from unifork.errors import writing
from unifork.shards.manifest import (
    MANIFEST,
    RECORD_SUFFIX,
    RECORDED,
    TEMPORARY,
    Shard,
    fault,
    read_records,
    recorded_shards,
    revert_to_records,
)

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
    return sorted({path.parent for name in RECORDED for path in folder.rglob(name)})


def faults(folder: Path, threads: int = THREADS) -> list[Damage]:
    """What is wrong in the folder of one job: shards that are missing or damaged, records, files of killed runs.

    Every shard is read; reading and hashing are done in threads, which do not wait for each other.
    """
    shards, unread = read_records(folder)
    found = [Damage(folder, name, _unread(name, why)) for name, why in unread.items()]
    if not (folder / MANIFEST).exists():
        found.append(Damage(folder, MANIFEST, "missing: the stage has not finished"))
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
        revert_to_records(folder, [shard for name, shard in recorded_shards(folder).items() if name not in wrong])
    for damage in found:
        with writing(damage.folder):
            (damage.folder / damage.name).unlink(missing_ok=True)


def _unread(name: str, why: str) -> str:
    if name.endswith(RECORD_SUFFIX):
        return "damaged record"
    return f"damaged ({why}); without it no shard is known to be whole, and all are made again"
