"""Lists of URLs as Parquet, TSV or CSV: LAION, COYO, Unsplash. Metadata only; nothing here opens a connection.

What a card says of them, the columns under one name, and the entries. The options are part of the card, the rules
every URL is fetched by included, since they decide which rows come out; another value makes the shards anew.

The same quantity is `URL` in LAION's releases, `url` in COYO and in anything that img2dataset wrote, and
`photo_image_url` at Unsplash. Names are compared without case; where several columns say the same, the
first of the table that is filled in a row wins. Types are whatever went through Spark and pandas: sides as
floats, NaN for nothing, numbers as text; what is no number or text of its column becomes None.
Unsplash's tables are tab-separated whatever their ending says (`.tsv000`, `.csv000`), so a text table's
separator is found in its first line.

The spellings of `url_columns.yaml` are from laion-prepro and img2dataset's dataset_examples (LAION), the READMEs of
coyo-dataset and of unsplash/datasets. The columns of Re-LAION were not seen; they are expected to be LAION's.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from unifork.config import StrictModel, read_yaml
from unifork.errors import ChangedFile, ConfigError, Rejected
from unifork.shards.task import Slice
from unifork.sources import Row, RowError, Source, SourceOptions, cut, names_of, row_of
from unifork.sources.files import TABLES, file_named, files_of, table_count, table_rows, table_sha256

# ----------------------------------------------------------------------------------------- options

Network = IPv4Network | IPv6Network


class FetchRules(StrictModel):
    """What may be fetched, and at what cost."""

    allow_addresses: tuple[Network, ...] = ()
    """Networks that may be contacted although they are not public: tests and intranets."""
    max_bytes: PositiveInt = 32 * 1024**2
    """Largest body of an answer; the connection is closed at the next byte."""
    max_pixels: PositiveInt = 64_000_000
    """Largest width times height; read from the header, so a larger image is never decoded."""
    decode: Literal["full", "header"] = "full"
    """What is checked of an image before it is kept: all of its bytes, or its header, which leaves it to the filter
    (`unifork.filters.measure`) to name those that cannot be decoded."""
    max_redirects: NonNegativeInt = 5
    """Redirects followed for one URL; each target is checked like a URL of the list."""
    timeout_seconds: PositiveFloat = 30.0
    """Time for one attempt at a URL from the first packet to the last byte, redirects included."""
    attempts: PositiveInt = 3
    """How often a row is tried when its failure may pass: no answer in time, an overloaded server."""
    backoff_seconds: NonNegativeFloat = 5.0
    """Pause before the second attempt; doubles with each further one."""
    robots: bool = True
    """Ask each host's robots.txt and leave out what it denies."""
    opt_out: bool = True
    """Leave out what its answer's headers reserve (X-Robots-Tag, TDM-Reservation)."""
    user_agent: Annotated[str, Field(pattern=r"^[\x20-\x7e]+$")] = "unifork"
    """Sent with every request; its first word is the name that robots.txt and X-Robots-Tag may address."""
    tail_seconds: PositiveFloat = 120.0
    """Time for the last twentieth of a shard's rows; no attempt starts after it."""
    shard_seconds: PositiveFloat = 7200.0
    """Time for a whole shard; no attempt starts after it."""


class UrlList(SourceOptions):
    """Tables with one URL a row, and how they are read and fetched."""

    files: str
    """A table, a folder of them, or a glob pattern: Parquet, TSV or CSV."""
    columns: dict[str, str] = {}
    """Our column: its spelling in the lists, in any case, where `url_columns.yaml` does not know it.
    `key: COLUMN` names the rows by a column that differs in every row; otherwise they are file name and number."""
    fetch: FetchRules = FetchRules()

    @property
    def web(self) -> bool:
        return True


# ----------------------------------------------------------------------------------------- columns


def text_or_none(value: Any) -> str | None:
    """A value as a text; None where it is empty or no number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        value = value.decode()
    return str(value).strip() or None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    try:
        return int(value)  # a 64-bit hash does not survive a float
    except (TypeError, ValueError, OverflowError):
        number = _number(value)
    return None if number is None else int(number)


_READERS: dict[str, Callable[[Any], Any]] = {"text": text_or_none, "number": _number, "whole": _whole}
_COLUMNS: dict[str, dict[str, list[str]]] = read_yaml(Path(__file__).with_name("url_columns.yaml"))
READ: dict[str, Callable[[Any], Any]] = {name: _READERS[kind] for kind, columns in _COLUMNS.items() for name in columns}
"""Canonical name -> how its values are read. Everything else in a list has no meaning here and is left out."""
SPELLINGS = {name: spellings for columns in _COLUMNS.values() for name, spellings in columns.items()}
"""Canonical name -> the lower-case names of its columns, best first."""

Mapped = dict[str, list[str]]
"""Canonical name -> the columns of a list that hold it, best first."""


def mapped(names: Iterable[str], place: str, named: Mapping[str, str] | None = None) -> Mapped:
    """Which columns of a list say what; `named` ones (ours -> theirs) go by the name they are given.

    Raises ConfigError when none of them holds URLs, or when a named one is not there.
    """
    here: dict[str, list[str]] = {}
    for name in names:
        here.setdefault(name.strip().lower(), []).append(name)
    found = {
        canonical: columns
        for canonical, spellings in SPELLINGS.items()
        if (columns := [name for spelling in spellings for name in here.get(spelling, [])])
    }
    shown = ", ".join(sorted(name for same in here.values() for name in same))[:1000]
    for canonical, name in (named or {}).items():
        if name.lower() not in here:
            raise ConfigError(f"{place}: no column {name!r} for {canonical!r}; found: {shown}")
        found[canonical] = here[name.lower()]
    if "url" not in found:
        raise ConfigError(f"{place}: no column of URLs; known: {', '.join(SPELLINGS['url'])}; found: {shown}")
    return found


def canonical(row: Mapping[str, Any], columns: Mapped) -> dict[str, Any]:
    """A row of a list under the canonical names; None where nothing usable is said."""
    by_name: dict[str, Any] = {}
    for name, spellings in columns.items():
        read: Callable[[Any], Any] = READ.get(name, text_or_none)
        values = (read(row.get(spelling)) for spelling in spellings)
        by_name[name] = next((value for value in values if value is not None), None)
    return by_name


# ----------------------------------------------------------------------------------------- entries


def slices(urls: UrlList, shard_rows: int) -> Iterator[Slice]:
    """Shards of every table that a card names. Raises ConfigError for a table without URLs."""
    for name, path in files_of(urls.files, TABLES):
        check = partial(mapped, place=path.name, named=urls.columns)
        yield from cut(table_count(path, check), shard_rows, file=name, content=table_sha256(path))


def rows(urls: UrlList, piece: Slice, _seed: int) -> Iterator[Row | RowError]:
    """The entries of one slice, without images: `unifork.sources.web` fetches those.

    In the table's order: `key`, and the columns of `url_columns.yaml` and of the card's `columns` that it has. Raises
    ChangedFile when the table is no longer the one that was planned with.
    """
    path = file_named(urls.files, piece)
    if not path.is_file() or piece.content != table_sha256(path):
        raise ChangedFile(f"{piece.file!r} of {urls.files!r}: missing, or changed since it was planned with; run again")
    columns: Mapped = {}

    def read(names: list[str]) -> list[str]:
        columns.update(mapped(names, path.name, urls.columns))
        return [column for same in columns.values() for column in same]

    for key, entry in zip(names_of(piece), table_rows(path, piece, read), strict=False):
        yield row_of(key, entry, partial(_row, columns=columns))


def _row(key: str, entry: Row, columns: Mapped) -> Row | RowError:
    """An entry of a table as a row without an image, called `key` where the table has no names. Raises Rejected."""
    row = {"key": key, **canonical(entry, columns)}
    "".join(value for value in row.values() if isinstance(value, str)).encode()  # raises UnicodeError
    if row["key"] is None:
        return RowError(key, "no_key", "the column of keys is empty", row["url"])
    if row["url"] is None:
        raise Rejected("no_url", "the column of URLs is empty")
    return row


SOURCE = Source(UrlList, slices, rows, paths=("files",), version=1)
