"""Where images come from. A kind of source plans its shards and yields the rows and faults of one of them.

A kind is one module with typed options and a `SOURCE`, and one entry in `SOURCES`; a card may also name
`MODULE:OBJECT`, which is how anybody's code takes part. A data set with a known kind is one card.
Rows carry `key, image, width, height, url, sha256`, the text columns of the card, and `license` where it is not the
card's. A slice never spans two files, so that a file added at the end makes no finished shard anew.
"""

import gzip
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from unifork.config import Card, StrictModel, parse
from unifork.errors import ConfigError, DataError
from unifork.registry import Registry
from unifork.shards.job import ShardJob, table_of, write_shard
from unifork.shards.quarantine import quarantined
from unifork.shards.schema import columns_of, image_text_schema
from unifork.shards.task import ShardResult, ShardTask, Slice

DOWNLOAD_VERSION = 1
"""Raise when the same card and task would give other rows."""

Row = dict[str, Any]


class SourceOptions(StrictModel):
    """What every kind of source may be told by a card."""

    access: Annotated[str, Field(exclude=True)] = ""  # dumped nowhere, so that it is part of no fingerprint
    """How a person gets the files; shown when they are missing."""


Options = TypeVar("Options", bound=SourceOptions)


@dataclass(frozen=True)
class RowError:
    """An entry of a source of which no row can be made: it is counted and goes to the quarantine."""

    key: str
    reason: str
    detail: str
    url: str | None = None


@dataclass(frozen=True)
class Source(Generic[Options]):
    """A kind of source."""

    options: type[Options]
    """What `source.options` of a card may say."""
    slices: Callable[[Options, int], Iterator[Slice]]
    """(options, shard_rows) -> what becomes of its shards, in order."""
    rows: Callable[[Options, Slice, int], Iterator[Row | RowError]]
    """(options, slice, seed) -> the rows of one shard."""
    paths: tuple[str, ...] = ()
    """Options that name files or folders."""
    endless: bool = False
    """It makes as many rows as are asked for."""
    seeded: bool = False
    """Its rows depend on the seed of the experiment; those of others stay when that changes, and get 0."""
    version: int = 0
    """Raise when the same options and slice would give other rows; part of the fingerprint."""


SOURCES: Registry[Source[Any]] = Registry(
    "kind of source",
    Source,
    {
        "emoji": "unifork.sources.emoji:SOURCE",
        "pairs": "unifork.sources.pairs:SOURCE",
        "imagenet": "unifork.sources.imagenet:SOURCE",
        "listed": "unifork.sources.listed:SOURCE",
        "listed_meta": "unifork.sources.listed:META_SOURCE",
        "url_list": "unifork.sources.url_lists:SOURCE",
    },
)


def source_of(card: Card) -> tuple[Source[Any], SourceOptions]:
    """The kind of a card's source and its options; no file is touched. Raises ConfigError naming the option."""
    place = f"card {card.name}"
    try:
        source = SOURCES.find(card.source.kind, f"{place}: source.kind")
    except ConfigError as error:
        raise ConfigError(f"{error}{_where(card.source.options.get('access'))}") from None
    return source, parse(source.options, card.source.options, place, "source.options")


def plan(card: Card, rows: int | None, shard_rows: int, seed: int) -> list[ShardTask]:
    """The shards of a card's source: slices of at most `shard_rows` rows, `rows` in all.

    Raises ConfigError for wrong options, for files that are not there or hold nothing, or when an endless source is
    asked for all its rows.
    """
    source, options = source_of(card)
    place = f"card {card.name}"
    if source.endless and rows is None:
        raise ConfigError(f"{place}: a {card.source.kind!r} source is endless; say how many rows to take")
    tasks: list[ShardTask] = []
    taken = 0
    try:
        for piece in source.slices(options, shard_rows):
            stop = piece.stop if rows is None else min(piece.stop, piece.start + rows - taken)
            tasks.append(ShardTask.from_source(replace(piece, stop=stop), seed if source.seeded else 0))
            taken += stop - piece.start
            if taken == rows:
                break
        if not tasks:
            raise ConfigError(f"a {card.source.kind!r} source finds nothing there that could become a row")
    except (ConfigError, DataError) as error:
        raise type(error)(f"{place}: {error}{_where(options.access)}") from None
    return tasks


def rows_of(card: Card, task: ShardTask) -> Iterator[Row | RowError]:
    """The rows of one planned shard."""
    source, options = source_of(card)
    assert task.piece is not None, f"card {card.name}: a task without a slice of a source"
    return source.rows(options, task.piece, task.seed)


def _where(access: str | None) -> str:
    return f". Where it is: {access}" if access else ""


# --------------------------------------------------------------------------------------- the worker


class Materialize:
    """Rows of a source -> image-text shard."""

    def __init__(self, card: Card) -> None:
        self.card, self.schema = card, image_text_schema(card)

    def rows(self, task: ShardTask) -> Iterator[Row | RowError]:
        """The rows of one planned shard, with their images."""
        return rows_of(self.card, task)

    def __call__(self, task: ShardTask) -> ShardResult:
        kept, rejected = [], []
        for row in self.rows(task):
            if isinstance(row, RowError):
                rejected.append(asdict(row))
            else:
                columns = {name: str(row[name]) for name in self.card.columns if row.get(name) is not None}
                kept.append({"license": self.card.license, **row, **columns})
        kept.sort(key=lambda row: row["key"])
        return write_shard(task, table_of(kept, self.schema), quarantined(task, rejected))


def download_job(card: Card, rows: int | None, shard_rows: int, seed: int, folder: Path, version: int = 0) -> ShardJob:
    """The plan of the download stage: one task for each slice of the source. Raises ConfigError or DataError.

    version: of a worker that fetches what the source names (`unifork.sources.web`).
    """
    source, options = source_of(card)
    columns = columns_of(image_text_schema(card))
    made_with = {
        "version": [DOWNLOAD_VERSION, source.version, version],
        "source": {"kind": card.source.kind, "options": options.model_dump(mode="json", exclude={"access"})},
        "columns": columns,
        "license": card.license,
    }
    lineage = {"source": card.source.model_dump(mode="json"), "license": card.license, "attribution": card.attribution}
    tasks = plan(card, rows, shard_rows, seed)
    return ShardJob("image-text", card.name, folder, columns, made_with, lineage, tasks)


# ------------------------------------------------------------------------------- slices and rows


def cut(count: int, shard_rows: int, **where: Any) -> Iterator[Slice]:
    """Consecutive slices of at most `shard_rows` of a file's `count` entries."""
    for start in range(0, count, shard_rows):
        yield Slice(start, min(start + shard_rows, count), **where)


def image_row(key: str, image: bytes, **more: Any) -> Row:
    """A row around an image as received; one that cannot be read has no sides (the filter names it)."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            width, height = opened.size
    except Exception:  # any decoder may raise anything on hostile bytes
        width = height = 0
    sha256 = hashlib.sha256(image).hexdigest()
    return {"key": key, "image": image, "width": width, "height": height, "url": "", "sha256": sha256, **more}


def parquet_rows(path: Path, piece: Slice, columns: Iterable[str]) -> Iterator[Row]:
    """The rows of a slice of a table; only row groups that hold some of them are read, one at a time."""
    file, first = pq.ParquetFile(path), 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        begin, end = max(piece.start - first, 0), min(piece.stop - first, count)
        if begin < end:
            chunk = file.read_row_group(group, columns=list(columns)).slice(begin, end - begin)
            for batch in chunk.to_batches(max_chunksize=1024):
                yield from batch.to_pylist()
        first += count


# ------------------------------------------------------------------------------------------- paths

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY", re.IGNORECASE)
_READERS = {
    (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz"): "tables of URLs are read by url_list",
    (".jsonl", ".jsonl.gz", ".jsonl.tgz", ".json"): "lists that name images are read by listed",
    (".tar", ".tgz", ".tar.gz"): "tars of images and texts are read by pairs",
}
"""Endings of files, and which kind of source reads them."""


def expanded(text: str) -> Path:
    """A path of a card with `~` and environment variables filled in. Raises ConfigError.

    Tasks and manifests keep the text as the card has it: what a variable holds reaches no file, and a
    variable that is named like a credential is refused, since error messages show paths.
    """
    for name in (braced or plain for braced, plain in _VARIABLE.findall(text)):
        if _SECRET.search(name):
            raise ConfigError(f"{text!r}: a path must not hold ${name}; credentials do not belong in paths")
        if name not in os.environ:
            raise ConfigError(f"{text!r}: the environment variable {name} is not set")
    return Path(os.path.expandvars(text)).expanduser()


def located(text: str) -> Path:
    """An existing file or folder of a card. Raises ConfigError."""
    path = expanded(text)
    if not path.exists():
        raise ConfigError(f"{text!r}: no such file or folder (relative paths start in {os.getcwd()!r})")
    return path


def files_of(text: str, suffixes: Iterable[str]) -> list[tuple[str, Path]]:
    """(name, path) of the files that a card names: one file, a glob, or everything with a suffix below a folder.

    Names are relative to what the card names, so that they stay when the data moves; they are in sorted
    order. Raises ConfigError when there are none.
    """
    root, pattern = _root(text)
    endings = tuple(suffixes)
    if root.is_file():
        return [(root.name, root)]
    if pattern is None:
        paths = [path for path in root.rglob("*") if path.name.lower().endswith(endings)]
    else:
        paths = list(root.glob(pattern))
    found = sorted((path.relative_to(root).as_posix(), path) for path in paths if not path.name.startswith("."))
    if not found:
        raise ConfigError(
            f"{text!r}: no such file or folder, nothing that matches, or nothing that ends in {' '.join(endings)} "
            f"(relative paths start in {os.getcwd()!r})"
        )
    return found


def check_ending(name: str, endings: tuple[str, ...]) -> None:
    """Raise ConfigError, which says who reads it, for a file that has none of the endings."""
    if not name.lower().endswith(endings):
        readers = (f"; {reader}" for others, reader in _READERS.items() if name.lower().endswith(others))
        raise ConfigError(f"{name}: this kind reads {', '.join(endings)}{next(readers, '')}")


def file_named(text: str, piece: Slice) -> Path:
    """The path of a slice's file, one of `files_of(text)`, without looking at the others."""
    root, _ = _root(text)
    return root if root.is_file() else root / (piece.file or "")


def as_planned(path: Path, piece: Slice) -> Path:
    """The file of a slice. Raises DataError when it is gone or has another size than when it was planned."""
    size = path.stat().st_size if path.is_file() else 0 if path.is_dir() else None
    if size != piece.bytes:
        raise DataError(f"{path.name}: {size} bytes, {piece.bytes} when the shards were planned; run the stage again")
    return path


def _root(text: str) -> tuple[Path, str | None]:
    """The part of a path before its first wild card, and the rest."""
    path = expanded(text)
    wild = next((number for number, part in enumerate(path.parts) if re.search(r"[*?\[]", part)), None)
    if wild is None or path.exists():
        return path, None
    return Path(*path.parts[:wild]), str(Path(*path.parts[wild:]))


def opened_list(path: Path, mode: str, **how: Any) -> Any:
    """A list or table, unpacked when it is called `.gz`; `mode` and `how` as for `open`."""
    return gzip.open(path, mode, **how) if path.suffix == ".gz" else open(path, mode, **how)


def without_suffix(name: str) -> str:
    """A file's name without its kind, for keys: `a/sa_000001.tar.gz` -> `a/sa_000001`."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.split(".")[0] or base)
