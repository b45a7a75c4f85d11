"""The files that a card names: found, checked, opened; tables among them (Parquet, TSV, CSV) row by row.

What of a table is damaged costs the rows that it holds, and every row is counted. A text table is read line by line. A
TSV has no quotes. In a CSV a quote that stands alone would take all that follows for one field: a field that holds the
beginning of another row's URL, or that is too long, costs its first line, and reading goes on at the next one.
"""

import csv
import gzip
import hashlib
import os
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from unifork.config.card import expanded
from unifork.errors import ChangedFile, ConfigError, Rejected, cause, tried
from unifork.shards.manifest import file_sha256
from unifork.shards.task import Slice
from unifork.sources import MAX_LINE_BYTES, Row, planned

PARQUET = ".parquet"
TABLES = (PARQUET, ".tsv", ".csv", ".tsv.gz", ".csv.gz")
Check = Callable[[list[str]], object]
"""Raises what is wrong with the names of a table's columns."""
MAX_FIELD = 65_536
"""Letters of the longest field of a CSV."""
URL_FIELD = re.compile(r"(?:^|[,\r\n])\"?https?:", re.IGNORECASE)
"""The beginning of a field with a URL: within a field of several lines it is one of another row."""
_READERS = {
    (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".jsonl.tgz", ".json"): (
        "tables and lists are read by table"
    ),
    (".tar", ".tgz", ".tar.gz"): "tars of images and texts are read by pairs",
    (".txt",): "texts without images are read by table, as entries of a list",
}
"""Endings of files, and which kind of source reads them."""


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
    named = ((path.relative_to(root).as_posix(), path) for path in paths)
    found = sorted((name, path) for name, path in named if not hidden(name))
    if not found:
        raise ConfigError(
            f"{text!r}: no such file or folder, nothing that matches, or nothing that ends in {' '.join(endings)} "
            f"(relative paths start in {os.getcwd()!r})"
        )
    return found


def hidden(name: str) -> bool:
    """Whether a file, or a folder above it, has a name that begins with a dot, as `._x.jpg` of macOS: it is no data."""
    return any(part.startswith(".") and part != ".." for part in PurePosixPath(name).parts)


def check_ending(name: str, endings: tuple[str, ...]) -> None:
    """Raise ConfigError, which says who reads it, for a file that has none of the endings."""
    if not name.lower().endswith(endings):
        readers = (f"; {reader}" for others, reader in _READERS.items() if name.lower().endswith(others))
        raise ConfigError(f"{name}: this kind reads {', '.join(endings)}{next(readers, '')}")


def file_named(text: str, piece: Slice) -> Path:
    """The path of a slice's file, one of `files_of(text)`, without looking at the others."""
    root, _ = _root(text)
    return root if root.is_file() else root / (piece.file or "")


def size_of(path: Path) -> int | None:
    """Bytes of a file, 0 for a folder, None where there is neither."""
    return path.stat().st_size if path.is_file() else 0 if path.is_dir() else None


def as_planned(path: Path, piece: Slice) -> Path:
    """The file of a slice. Raises ChangedFile when it is gone or has another size than when it was planned."""
    size = size_of(path)
    if size != piece.bytes:
        raise ChangedFile(f"{path.name}: {size} bytes, {piece.bytes} when the shards were planned; run the stage again")
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
    return gzip.open(path, mode, **how) if path.suffix.lower() == ".gz" else open(path, mode, **how)


# ------------------------------------------------------------------------------------------- tables


def table_count(path: Path, check: Check) -> int:
    """Rows of a table; damage is one more. Raises what `check` says of the names of its columns."""
    if path.suffix.lower() == PARQUET:
        return parquet_count(path, check)
    return sum(1 for _ in planned(text_rows(path, check), {}))


def table_rows(path: Path, piece: Slice, read: Callable[[list[str]], list[str]]) -> Iterator[Row | Rejected]:
    """The rows of a slice of a table. read: which of its columns, or raises what is wrong with their names."""
    if path.suffix.lower() == PARQUET:
        return parquet_rows(path, piece, read(pq.read_schema(path).names))
    return islice(text_rows(path, read), piece.start, piece.stop)


def parquet_count(path: Path, check: Check = len) -> int:
    """Rows of a table; 1 for one that cannot be opened, which `parquet_rows` then says.

    Raises what `check` says of the names of its columns.
    """
    try:
        metadata = pq.read_metadata(path)
        check(metadata.schema.to_arrow_schema().names)
        return int(metadata.num_rows)
    except Exception as error:
        cause(error)
        return 1


def parquet_rows(path: Path, piece: Slice, columns: list[str]) -> Iterator[Row | Rejected]:
    """The rows of a slice of a table; only row groups that hold some of them are read, one at a time.

    Errors are `broken_list` in a row group that cannot be read, `broken_text` where a text is
    not UTF-8. Raises what a damaged file raises.
    """
    file, first = pq.ParquetFile(path), 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        begin, end = max(piece.start - first, 0), min(piece.stop - first, count)
        first += count
        if begin >= end:
            continue
        try:
            chunk = file.read_row_group(group, columns=columns).slice(begin, end - begin)
            if chunk.num_rows != end - begin:
                raise ValueError(f"{chunk.num_rows} rows, {end - begin} are expected")
        except Exception as error:
            yield from [Rejected("broken_list", f"row group {group}: {cause(error)}")] * (end - begin)
            continue
        for batch in chunk.to_batches(max_chunksize=1024):
            try:
                yield from batch.to_pylist()
            except UnicodeError:
                yield from (tried(_single, batch.slice(number, 1)) for number in range(batch.num_rows))


def _single(batch: Any) -> Row:
    return dict(batch.to_pylist()[0])


def table_sha256(path: Path) -> str:
    """Hash of a table; of a Parquet file that of its footer (schema, sizes, statistics, offsets), read in no time."""
    if path.suffix.lower() != PARQUET:
        return file_sha256(path)
    with open(path, "rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, size - 8))
        handle.seek(max(0, size - 8 - int.from_bytes(handle.read(4), "little")))  # all of it where that is no footer
        return hashlib.file_digest(handle, "sha256").hexdigest()


# -------------------------------------------------------------------------------------- text tables

Line = tuple[str, int]
"""The beginning of a line, and its size."""


def text_rows(path: Path, check: Check) -> Iterator[Row | Rejected]:
    """The rows of a text table under the names of its header. Raises what damage raises.

    Bytes that are not UTF-8 (after the mark of UTF-16: not UTF-16) become surrogates.
    """
    with opened_list(path, "rb") as file:
        wide = file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE)
    encoding, errors = ("utf-16", "surrogatepass") if wide else ("utf-8-sig", "surrogateescape")
    with opened_list(path, "rt", newline="", encoding=encoding, errors=errors) as file:
        lines = bounded_lines(file, ("\n", "\r"))
        first = next(lines, ("", 0))
        if not first[0].strip():
            raise ValueError("empty, a line with the names of the columns is expected")
        table = (_tsv_rows if "\t" in first[0] else _csv_rows)(chain([first], lines))
        names = next(table)
        if isinstance(names, Rejected):
            raise ValueError(f"the line with the names of the columns: {names}")
        "".join(names).encode()  # raises UnicodeError: no table in any known encoding
        check(names)
        for fields in table:
            if isinstance(fields, Rejected):
                yield fields
            elif len(fields) != len(names):
                yield Rejected("broken_line", f"{len(fields)} fields, {len(names)} are expected: {fields!r:.200}")
            else:
                yield dict(zip(names, fields, strict=True))


def bounded_lines(file: Any, ends: Any, most: int = MAX_LINE_BYTES) -> Iterator[tuple[Any, int]]:
    """(beginning, size) of every line of a file; one that is longer than `most` is passed by piece by piece."""
    while line := file.readline(most):
        size, part = len(line), line
        while part and not part.endswith(ends):
            part = file.readline(most)
            size += len(part)
        yield line, size


def _tsv_rows(lines: Iterator[Line]) -> Iterator[list[str] | Rejected]:
    for line, size in lines:
        yield too_long(size) if size > len(line) else line.rstrip("\r\n").split("\t")


def _csv_rows(lines: Iterator[Line]) -> Iterator[list[str] | Rejected]:
    ahead: deque[Line] = deque()  # lines that were read for a field that they do not belong to
    while line := ahead.popleft() if ahead else next(lines, None):
        if line[1] > len(line[0]):
            yield too_long(line[1])
            continue
        taken: list[Line] = []
        try:
            fields = next(csv.reader(_lines_of_a_row(line, chain(_emptying(ahead), lines), taken)))
            for field in fields:
                if len(field) > MAX_FIELD:
                    raise csv.Error(f"a field of {len(field)} letters, at most {MAX_FIELD} are read")
                if ("\n" in field or "\r" in field) and URL_FIELD.search(field):
                    raise csv.Error("a quote opens a field that goes on to the URL of another row")
            yield fields
        except csv.Error as error:
            ahead.extendleft(reversed(taken))
            yield Rejected("broken_line", f"{error}: {line[0]!r:.200}")


def _lines_of_a_row(first: Line, others: Iterator[Line], taken: list[Line]) -> Iterator[str]:
    """The lines that `csv` asks for because a field has not ended yet; the further ones are noted."""
    yield first[0]
    size = 0
    for line in others:
        taken.append(line)
        yield line[0]
        if (size := size + line[1]) > MAX_FIELD:
            break
    raise csv.Error(f"a quote is not closed within {MAX_FIELD} letters")


def _emptying(lines: deque[Line]) -> Iterator[Line]:
    while lines:
        yield lines.popleft()


def too_long(size: int) -> Rejected:
    """What is wrong with an entry of that size."""
    return Rejected("broken_line", f"{size} bytes in one entry, at most {MAX_LINE_BYTES} are read")
