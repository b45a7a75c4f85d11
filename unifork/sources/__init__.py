"""Where images come from. A kind of source plans its shards and yields one row or error for each entry of one of them.

A kind is one module with typed options and a `SOURCE`, and one entry in `SOURCES`; a card may also name
`MODULE:OBJECT`, which is how anybody's code takes part. A data set with a known kind is one card.
Rows carry `key, image, width, height, url, sha256`, the text columns of the card, and `license` where it is not the
card's; a row of texts alone has no image, and nothing that an image has. A slice never spans two files, so that a file
added at the end makes no finished shard anew.

One bad row costs one row, and one bad file that file: rows kept and rows dropped add up to the entries that were
planned. What of a file cannot be planned any more is one entry of it, and reading it says what is wrong. Only
the machine (`MachineError`), a mistake of the user (`ConfigError`) and a file that has changed since it was planned
with (`ChangedFile`) end the work on a shard.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Generic, TypeVar

import pyarrow as pa
from pydantic import Field

from unifork.config import Card, StrictModel, located, parse
from unifork.errors import ConfigError, DataError, Found, Rejected, cause, tried
from unifork.images import open_image, shrink
from unifork.registry import Registry
from unifork.shards.job import ShardJob, table_of, write_shard
from unifork.shards.schema import columns_of, image_text_schema
from unifork.shards.task import ShardResult, ShardTask, Slice, quarantined
from unifork.vocabulary import MORE_IMAGES

__all__ = ["located"]  # what a kind of source that is written elsewhere needs stands in one module

DOWNLOAD_VERSION = 2
"""Raise when the same card and task would give other rows."""
MAX_IMAGE_BYTES = 32 * 1024**2
"""Largest image that is read from an archive, folder or table."""
MAX_IMAGES = 64
"""Most images of a row that are read."""
MAX_TEXT_BYTES = 1024**2
"""Largest text that is read from an archive or folder."""
MAX_LINE_BYTES = 16 * 1024**2
"""Largest entry of a list that is read."""

Row = dict[str, Any]
Entry = TypeVar("Entry")


class SourceOptions(StrictModel):
    """What every kind of source may be told by a card."""

    access: Annotated[str, Field(exclude=True)] = ""  # dumped nowhere, so that it is part of no fingerprint
    """How a person gets the files; shown when they are missing."""

    @property
    def web(self) -> bool:
        """Whether the images are fetched from the web, by the rules of an option `fetch` (`url_lists.FetchRules`)."""
        return False

    @property
    def text_only(self) -> bool:
        """Whether no row has an image."""
        return False


Options = TypeVar("Options", bound=SourceOptions)


@dataclass(frozen=True)
class RowError:
    """An entry of a source of which no row can be made: it is counted and goes to the quarantine."""

    key: str
    reason: str
    detail: str
    url: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Source(Generic[Options]):
    """A kind of source."""

    options: type[Options]
    """What `source.options` of a card may say."""
    slices: Callable[[Options, int], Iterator[Slice]]
    """(options, shard_rows) -> what becomes of its shards, in order."""
    rows: Callable[[Options, Slice, int], Iterator[Row | RowError]]
    """(options, slice, seed) -> the rows of one shard, one row or error for each entry of the slice."""
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
        "table": "unifork.sources.table:SOURCE",
        "table_meta": "unifork.sources.table:META_SOURCE",
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
    options = parse(source.options, card.source.options, place, "source.options")
    if options.text_only and card.text_only == "drop":
        raise ConfigError(f"{place}: text_only: no row of its source has an image; say text_only: keep")
    return source, options


def check_installed(card: Card) -> None:
    """Raise ConfigError where the images of a card cannot be had for want of a module."""
    if source_of(card)[1].web and not find_spec("img2dataset"):
        raise ConfigError(
            f"card {card.name}: its images are fetched by img2dataset, which is not installed; it comes with the "
            "extra: pip install 'unifork[web]'"
        )


def plan(card: Card, rows: int | None, shard_rows: int, seed: int) -> list[ShardTask]:
    """The shards of a card's source: slices of at most `shard_rows` rows, `rows` in all.

    Raises ConfigError for wrong options, for files that are not there or hold nothing, or when an endless source is
    asked for all its rows.
    """
    check_installed(card)
    source, options = source_of(card)
    place = f"card {card.name}"
    if source.endless and rows is None:
        raise ConfigError(f"{place}: a {card.source.kind!r} source is endless; say how many rows to take")
    tasks, files = list[ShardTask](), dict[str, str | None]()
    taken = 0
    try:
        for piece in source.slices(options, shard_rows):
            if (same := files.setdefault(place_of(piece), piece.file)) != piece.file:
                raise ConfigError(f"{same} and {piece.file}: their rows would have the same keys; rename one of them")
            stop = piece.stop if rows is None else min(piece.stop, piece.start + rows - taken)
            tasks.append(ShardTask(piece=replace(piece, stop=stop), seed=seed if source.seeded else 0))
            taken += stop - piece.start
            if taken == rows:
                break
        if not tasks:
            raise ConfigError(f"a {card.source.kind!r} source finds nothing there that could become a row")
    except (ConfigError, DataError) as error:
        raise type(error)(f"{place}: {error}{_where(options.access)}") from None
    return tasks


def _where(access: str | None) -> str:
    return f". Where it is: {access}" if access else ""


# --------------------------------------------------------------------- what a broken input costs


def named(key: str, found: Found | Rejected) -> Found | RowError:
    """What was found for a row, or its error."""
    return RowError(key, found.reason, str(found)) if isinstance(found, Rejected) else found


def attempt(key: str, make: Callable[..., Row | RowError], *arguments: Any) -> Row | RowError:
    """The row that `make` makes; what it raises, such as for a value of a kind that nobody expects, costs this row."""
    return named(key, tried(make, *arguments))


def row_of(key: str, entry: Found | Rejected, make: Callable[[str, Found], Row | RowError]) -> Row | RowError:
    """The row that `make` makes of an entry that was read, or its error."""
    return named(key, entry) if isinstance(entry, Rejected) else attempt(key, make, key, entry)


def planned(entries: Iterator[Entry], rest: Entry) -> Iterator[Entry]:
    """The entries of a file while it is planned; where it is damaged, `rest` stands for all that cannot be read."""
    try:
        yield from entries
    except Exception as error:
        cause(error)
        yield rest


KIND = re.compile(r"(\.snappy)?\.(parquet|tsv|csv|jsonl?|tar|tgz)(\.gz|\.tgz|\.tar\.gz)?$", re.IGNORECASE)
"""The end of a file's name that says how it is read. Other dots stay: `a.1.csv` and `a.2.csv` are two places."""


def place_of(piece: Slice) -> str:
    """The first part of a key that is the file and number of an entry."""
    name = without_kind(piece.file or "")
    return f"{name}~{piece.again}" if piece.again else name


def without_kind(name: str) -> str:
    """A file's name without its kind, for keys: `a/sa_000001.tar.gz` -> `a/sa_000001`."""
    return KIND.sub("", name)


def names_of(piece: Slice, place: str = "") -> list[str]:
    """What entries of a slice are called that have no other name: file, or `place`, and number."""
    return [f"{place_of(piece) or place}/{number:09d}" for number in range(piece.start, piece.stop)]


def rows_of(card: Card, task: ShardTask) -> Iterator[Row | RowError]:
    """One row or error for each entry of a planned shard, whatever its source does; no key comes twice.

    A source that breaks off loses the entries that it has not yielded: `broken_list`, each named by file and number.
    Raises what `cause` does.
    """
    source, options = source_of(card)
    piece = task.piece
    assert piece is not None, f"card {card.name}: a task without a slice of a source"
    names = names_of(piece, card.name)
    seen: set[str] = set()
    count, why = 0, "the source says nothing of this entry"
    try:
        for row in source.rows(options, piece, task.seed):
            name = names[min(count, len(names) - 1)]  # also of those that a source yields beyond its slice
            keyed = row if isinstance(row, RowError) else attempt(name, _with_key, row, name, seen)
            count += 1
            seen.add(keyed.key if isinstance(keyed, RowError) else keyed["key"])
            yield keyed
    except Exception as error:
        why = cause(error)
    lost = [name for name in names if name not in seen]
    yield from (RowError(name, "broken_list", why) for name in lost[len(lost) - max(0, len(names) - count) :])


def _with_key(row: Row, name: str, seen: set[str]) -> Row | RowError:
    """A row whose key names it and nothing else; `name` is what it is called where it has none."""
    key, url = row.get("key"), row.get("url")
    if not isinstance(key, str) or not key.strip():
        return RowError(name, "no_key", f"the key is {key!r}, a text that names the row is expected", url)
    if leaves(key):
        return RowError(key, "path_outside", f"{key!r}: a key is a relative path without '..'", url)
    if key in seen:
        return RowError(key, "duplicate_key", "an earlier row of this shard has the same key", url)
    try:
        key.encode()
    except UnicodeError as error:
        return RowError(key, "broken_name", cause(error), url)
    return row


def leaves(name: str) -> bool:
    """Whether a path, used as one, would lead out of the folder it is relative to."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


# --------------------------------------------------------------------------------------- the worker


class Materialize:
    """Rows of a source -> image-text shard."""

    def __init__(self, card: Card) -> None:
        self.card, self.schema = card, image_text_schema(card)

    def rows(self, task: ShardTask) -> Iterator[Row | RowError]:
        """The rows of one planned shard, with their images."""
        return rows_of(self.card, task)

    def __call__(self, task: ShardTask) -> ShardResult:
        table, rejected = self.materialized(task)
        return write_shard(task, table, quarantined(task, map(asdict, rejected)))

    def materialized(self, task: ShardTask) -> tuple[pa.Table, list[RowError]]:
        """The rows of a planned shard as it holds them, and what is left out."""
        kept, rejected = _sifted(self.rows(task), self._ready)
        kept.sort(key=lambda row: row["key"])
        try:
            return table_of(kept, self.schema), rejected
        except Exception:  # a column cannot hold a value: whose is found row by row, so that a clean shard pays nothing
            held, others = _sifted(kept, self._held)
            return table_of(held, self.schema), rejected + others

    def _ready(self, row: Row) -> Row:
        """A row as the shard holds it. Raises Rejected."""
        has_image, more = row.get("image") is not None, row.get(MORE_IMAGES) or ()
        if not has_image and self.card.text_only == "drop":
            raise Rejected("text_only", "a row without an image; text_only: keep in its card takes it")
        if more and self.card.several_images == "drop":
            raise Rejected("several_images", f"{len(more) + 1} images; several_images: keep in its card takes them")
        if self.card.shrink and has_image:  # hashes stay those of images as received, which lists name
            row = {**row, **self._shrunk(row), MORE_IMAGES: list(map(self._shrunk, more))}
        columns = {name: str(row[name]) for name in self.card.columns if row.get(name) is not None}
        return {"license": self.card.license, **row, **columns}

    def _shrunk(self, image: Row) -> Row:
        assert self.card.shrink, f"{self.card.name}: images are kept as received"
        data = shrink(image["image"], self.card.matte, **self.card.shrink.model_dump())
        return {"sha256": image.get("sha256"), **sized(data)}

    def _held(self, row: Row) -> Row:
        table_of([row], self.schema)
        return row


def _sifted(rows: Iterable[Row | RowError], make: Callable[[Row], Row]) -> tuple[list[Row], list[RowError]]:
    """What `make` makes of rows, and the errors of those of which it makes none."""
    kept: list[Row] = []
    rejected: list[RowError] = []
    for row in rows:
        found = row if isinstance(row, RowError) else attempt(row["key"], make, row)
        if not isinstance(found, RowError):
            kept.append(found)
        elif isinstance(row, RowError):
            rejected.append(row)
        else:
            rejected.append(replace(found, url=row.get("url"), sha256=row.get("sha256")))
    return kept, rejected


def download_job(card: Card, rows: int | None, shard_rows: int, seed: int, folder: Path, version: int = 0) -> ShardJob:
    """The plan of the download stage: one task for each slice of the source. Raises ConfigError or DataError.

    version: of a worker that fetches what the source names (`unifork.sources.web`).
    """
    source, options = source_of(card)
    columns = columns_of(image_text_schema(card))
    made_with: dict[str, Any] = {
        "version": [DOWNLOAD_VERSION, source.version, version],
        "source": {"kind": card.source.kind, "options": options.model_dump(mode="json", exclude={"access"})},
        "columns": columns,
        "license": card.license,
    }
    made_with |= {name: "keep" for name in ("text_only", "several_images") if getattr(card, name) == "keep"}
    if card.shrink:
        made_with["shrink"] = {**card.shrink.model_dump(), "matte": card.matte}
    lineage = {"source": card.source.model_dump(mode="json"), "license": card.license, "attribution": card.attribution}
    tasks = plan(card, rows, shard_rows, seed)
    return ShardJob("image-text", card.name, folder, columns, made_with, lineage, tasks)


# ------------------------------------------------------------------------------- slices and rows


def cut(count: int, shard_rows: int, **where: Any) -> Iterator[Slice]:
    """Consecutive slices of at most `shard_rows` of a file's `count` entries."""
    for start in range(0, count, shard_rows):
        yield Slice(start, min(start + shard_rows, count), **where)


def image_row(key: str, image: bytes, *others: bytes, **more: Any) -> Row:
    """A row around images as received; one that cannot be opened has no sides (the filter names it)."""
    return {"key": key, **hashed(image), "url": "", MORE_IMAGES: list(map(hashed, others)), **more}


def hashed(image: bytes) -> Row:
    """The columns of an image as received."""
    return {**sized(image), "sha256": hashlib.sha256(image).hexdigest()}


def text_row(key: str, **more: Any) -> Row:
    """A row of texts alone."""
    return {"key": key, "image": None, "url": "", **more}


def oversize(size: int, most: int = MAX_IMAGE_BYTES) -> Rejected | None:
    """Why so many bytes are not read; None where they are."""
    return Rejected("too_large", f"{size} bytes, at most {most} are read") if size > most else None


def sized(image: bytes) -> Row:
    """The columns of an image and its sides, which are those in its header; nothing is decoded."""
    try:
        with open_image(image) as opened:
            width, height = opened.size
    except Rejected:
        width = height = 0
    return {"image": image, "width": width, "height": height}
