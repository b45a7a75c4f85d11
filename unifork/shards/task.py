"""The two messages between a driver and its workers: what shard to make, and what was made.

A job plans one `ShardTask` for each shard; a worker turns it into a finished file and answers with a `ShardResult`.
Both are plain and small (paths, counts, hashes), never images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from unifork.config import fingerprint
from unifork.shards.manifest import Shard
from unifork.vocabulary import Task


@dataclass(frozen=True)
class Slice:
    """Rows of a source that become one shard: entries `start` to `stop - 1` of one of its files."""

    start: int
    stop: int
    file: str | None = None
    """Name of the file within what the card names."""
    bytes: int | None = None
    """Its size when it was planned with."""
    content: str | None = None
    """Its hash, that of its footer, or of what else decides its rows, when it was planned with."""
    offset: int | None = None
    """Byte at which entry `start` begins."""
    again: int | None = None
    """Number of the repetition, for lists that are read several times."""
    label: int | None = None
    """Class of all its entries, where a file holds one class."""

    @property
    def rows(self) -> int:
        """Number of its entries."""
        return self.stop - self.start


@dataclass(frozen=True)
class Published:
    """A shard of a publication, to be made a shard of codes again."""

    uri: str
    """Address of the publication."""
    name: str
    """The shard's name there."""
    sha256: str
    rows: int
    withdrawn: int
    """Rows that were left out when it was published."""
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class ShardTask:
    """One shard to make. What it is made from is one of `piece`, `shard` and `published`.

    Download says `piece` and `seed`, measuring, signatures, prepare `shard`, the filter `duplicates` besides, encode
    `kept`, `kept_folder` and `use`, publish `withdrawn`; fetch says `published`.
    """

    piece: Slice | None = None
    """A slice of the source."""
    seed: int = 0
    """Of a source that makes its rows by itself."""
    shard: Shard | None = None
    """A finished shard of an earlier job."""
    published: Published | None = None
    """A shard of a publication."""
    use: Task | None = None
    """The task whose view is encoded."""
    duplicates: str | None = None
    """SHA-256 of the list of the shard's rows that have an earlier duplicate."""
    withdrawn: tuple[str, ...] = ()
    """Keys that are left out."""
    kept: Shard | None = None
    """A finished shard that names the rows of `shard` that are read."""
    kept_folder: str = ""
    """Its folder; no part of the fingerprint."""
    folder: str = ""
    """Folder of the input shard; like all that follows no part of the fingerprint, since data may move."""
    output: str = ""
    """Path of the shard to write."""
    store: str | None = None
    """Folder of a store that it goes to; None leaves it where it is written."""
    inputs: str = ""
    """Fingerprint of everything it is made from; of a fetched shard that is the one it was, known beforehand."""
    beside: tuple["ShardTask", ...] = ()
    """Shards of other jobs that are made of the same rows at once; of no fingerprint."""

    @property
    def rows(self) -> int:
        """Rows that it reads."""
        parts = (self.piece, self.shard, self.published)
        return next(part.rows for part in (self.kept, *parts) if part is not None)

    def fingerprint(self, made_with: Mapping[str, Any]) -> str:
        """Hash of everything the shard is made from: what lies where decides nothing."""
        what = {
            "piece": self.piece and asdict(self.piece),
            "seed": self.seed,
            "shard": self.shard and self.shard.identity(),
            "kept": self.kept and self.kept.identity(),
            "published": self.published and asdict(self.published),
            "use": self.use,
            "duplicates": self.duplicates,
            "withdrawn": self.withdrawn,
        }
        return fingerprint({"made_with": dict(made_with), **{name: value for name, value in what.items() if value}})

    def placed(self, folder: Path | None, output: Path, store: str | None, inputs: str) -> Self:
        """The task with where its input lies and where its shard goes."""
        source = str(folder.absolute()) if folder else ""
        return replace(self, folder=source, output=str(output.absolute()), store=store, inputs=inputs)


@dataclass(frozen=True)
class ShardResult:
    """What became of a task: a finished shard, or why there is none."""

    output: str
    """Path of the shard, which names the task."""
    shard: Shard | None = None
    problem: str | None = None
    """Why the worker did not make it."""
    traceback: str | None = None
    """Of a mistake of the program."""
    beside: tuple["ShardResult", ...] = ()
    """Of the tasks beside its own."""


def joined(tasks: Sequence[ShardTask]) -> list[ShardTask]:
    """Tasks of the same rows, one beside the other."""
    same: dict[tuple[str | None, ...], list[ShardTask]] = {}
    for task in tasks:
        paths = (shard.path if shard else None for shard in (task.shard, task.kept))
        same.setdefault((task.folder, task.kept_folder, *paths), []).append(task)
    return [replace(first, beside=tuple(others)) for first, *others in same.values()]
