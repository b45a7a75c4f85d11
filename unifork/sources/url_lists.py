"""Lists of URLs as Parquet, TSV or CSV: LAION, COYO, Unsplash. Metadata only; nothing here opens a connection.

Unsplash's tables are tab-separated whatever their ending says (`.tsv000`, `.csv000`), so a text table's
separator is found in its first line.
"""

import csv
import gzip
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from unifork.config import parse
from unifork.errors import DataError
from unifork.shards.manifest import file_sha256
from unifork.sources.base import Fault, Options, Row, Slice, Task, cut, files_of, without_suffix
from unifork.sources.columns import Mapped, canonical, mapped
from unifork.sources.web.rules import UrlList

TABLES = (".parquet", ".tsv", ".csv", ".tsv.gz", ".csv.gz")
csv.field_size_limit(1 << 24)  # a longer field is a stray quote, not a caption


def slices(options: Options, shard_rows: int) -> Iterator[Slice]:
    """Shards of the lists of a card."""
    known = parse(UrlList, options, "source.options")
    return url_slices(known.files, shard_rows, known.columns)


def rows(task: Task) -> Iterator[Row | Fault]:
    """The entries of a shard, without pictures: `unifork.sources.web` fetches those."""
    known = parse(UrlList, task["options"], "source.options")
    return url_rows(known.files, task, known.columns)


def url_slices(lists: str, shard_rows: int, named: Mapping[str, str] | None = None) -> Iterator[Slice]:
    """Shards of every table that a card names. Raises ConfigError for a table without URLs."""
    for name, path in files_of(lists, TABLES):
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            mapped(file.schema_arrow.names, name, named)
            count, content = file.metadata.num_rows, _footer_sha256(path)
        else:
            with _reader(path) as reader:
                mapped(next(reader, []), name, named)
                count, content = sum(1 for _ in reader), file_sha256(path)
        yield from cut(count, shard_rows, file=name, content=content)


def url_rows(lists: str, one: Slice, named: Mapping[str, str] | None = None) -> Iterator[Row | Fault]:
    """The entries of one slice, in the table's order: `key`, and the columns of `COLUMNS` and of `named` it has.

    Raises DataError when the table is no longer the one that was planned with.
    """
    path = dict(files_of(lists, TABLES)).get(one["file"])
    parquet = path is not None and path.suffix == ".parquet"
    if path is None or one["content"] != (_footer_sha256(path) if parquet else file_sha256(path)):
        raise DataError(f"{one['file']!r} of {lists!r}: missing, or changed since it was planned with; run again")
    read = _parquet_rows if parquet else _text_rows
    for number, row in enumerate(read(path, one["start"], one["stop"], named), one["start"]):
        key = f"{without_suffix(one['file'])}/{number:09d}"
        if isinstance(row, str):
            yield Fault(key, "broken_line", row)
        elif row["url"] is None:
            yield Fault(key, "no_url", "the column of URLs is empty")
        else:
            yield {"key": key, **row}


def _footer_sha256(path: Path) -> str:
    """Hash of a Parquet footer: schema, sizes, statistics and offsets of all column chunks; read in no time."""
    with open(path, "rb") as handle:
        handle.seek(-8, os.SEEK_END)
        length = int.from_bytes(handle.read(4), "little")
        handle.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(handle.read(length)).hexdigest()


def _parquet_rows(path: Path, start: int, stop: int, named: Mapping[str, str] | None) -> Iterator[Row | str]:
    file = pq.ParquetFile(path)
    columns = mapped(file.schema_arrow.names, path.name, named)
    wanted, first = [name for names in columns.values() for name in names], 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        begin, end = max(start - first, 0), min(stop - first, count)
        if begin < end:
            chunk = file.read_row_group(group, columns=wanted).slice(begin, end - begin)
            for batch in chunk.to_batches(max_chunksize=1024):
                yield from (canonical(row, columns) for row in batch.to_pylist())
        first += count


def _text_rows(path: Path, start: int, stop: int, named: Mapping[str, str] | None) -> Iterator[Row | str]:
    with _reader(path) as reader:
        names = next(reader)
        columns: Mapped = mapped(names, path.name, named)
        for fields in islice(reader, start, stop):
            if len(fields) == len(names):
                yield canonical(dict(zip(names, fields, strict=True)), columns)
            else:
                yield f"{len(fields)} fields, {len(names)} are expected: {fields!r:.200}"


@contextmanager
def _reader(path: Path) -> Iterator[Any]:
    """The lines of a text table as lists of fields, the header first."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        header = file.readline()
        if not header:
            raise DataError(f"{path}: empty, a line with the names of the columns is expected")
        file.seek(0)
        yield csv.reader(file, delimiter="\t" if "\t" in header else ",")
