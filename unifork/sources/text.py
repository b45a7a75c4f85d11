"""Corpora of texts alone: a column of jsonl files, JSON arrays or Parquet. A row has no image.

Its key is the file and its number there. A card of this kind says `text_only: keep`.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from unifork.errors import unknown
from unifork.shards.task import Slice
from unifork.sources import Row, RowError, Source, SourceOptions, attempt, cut, place_of, text_row
from unifork.sources.listed import LISTS, list_slices, objects, texts_of
from unifork.sources.paths import as_planned, file_named, files_of, size_of
from unifork.sources.tables import parquet_count, parquet_rows

PARQUET = ".parquet"


class TextOptions(SourceOptions):
    """What a card says of such a set."""

    files: str
    """jsonl files (also .gz, or alone in a .tgz), JSON arrays or Parquet; a file, a folder or a glob."""
    texts: dict[str, str]
    """Column -> field that fills it; `meta.text` is a field of a field. Dialogues are translated."""
    keep: dict[str, str] = {}
    """The same for columns that are no text of the row."""

    @property
    def fields(self) -> list[str]:
        """The fields of an entry that are read."""
        return sorted({field.split(".")[0] for field in (*self.texts.values(), *self.keep.values())})


def slices(options: TextOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards of every file. Raises ConfigError for a table without a column that is named."""
    for name, path in files_of(options.files, (*LISTS, PARQUET)):
        if path.suffix == PARQUET:
            rows_there = parquet_count(path, partial(_check, options, name))
            yield from cut(rows_there, shard_rows, file=name, bytes=size_of(path))
        else:
            yield from list_slices(path, shard_rows, file=name)


def _check(options: TextOptions, name: str, columns: list[str]) -> None:
    for field in options.fields:
        if field not in columns:
            raise unknown("column", field, columns, name)


def rows(options: TextOptions, piece: Slice, _seed: int) -> Iterator[Row | RowError]:
    """The rows of one slice of a file."""
    path = file_named(options.files, piece)
    for key, entry in (_of_table if path.suffix == PARQUET else _of_list)(path, piece, options):
        row = entry if isinstance(entry, RowError) else attempt(key, texts_of, key, entry, options.texts, options.keep)
        yield replace(row, key=key) if isinstance(row, RowError) else text_row(key, **row)


def _of_table(path: Path, piece: Slice, options: TextOptions) -> Iterator[tuple[str, Row | RowError]]:
    entries = parquet_rows(as_planned(path, piece), piece, options.fields)
    yield from ((f"{place_of(piece)}/{number:09d}", entry) for number, entry in enumerate(entries, piece.start))


def _of_list(path: Path, piece: Slice, _options: TextOptions) -> Iterator[tuple[str, Row | RowError]]:
    return objects(path, piece)


SOURCE = Source(TextOptions, slices, rows, paths=("files",), text_only=True)
