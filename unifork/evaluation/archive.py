"""The files of a benchmark as a person downloaded them: JSON, lines of it, TSV, Parquet, and images.

In: a card and its folder. Out: rows, and the bytes of images by name. Nothing is fetched, and no path or link leads out
of the folder. An image has a name by which it is found again: its path, or `FILE#ROW` of a table that holds it.
"""

import base64
import csv
import gzip
import json
from collections.abc import Iterator
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from unifork.config import EvalCard, StrictModel
from unifork.errors import DataError, refusing
from unifork.evaluation.items import faults
from unifork.shards.manifest import file_sha256
from unifork.sources import MAX_IMAGE_BYTES, leaves
from unifork.sources.archives import read_below

HELD = "image"
"""Column of a table that holds images; read only when one is wanted."""
LONGEST_INDEX = 64
"""Letters: a longer text in the column `image` of a TSV is an image, a shorter one the index of the row that has it."""


class Archive:
    """A benchmark's folder."""

    def __init__(self, card: EvalCard, options: StrictModel, folder: Path | None = None) -> None:
        """options: of its suite; `images` among them is the folder of the images. folder: another than the card's."""
        self.card, self.folder = card, (folder or Path(card.items.archive or "."))
        self.images = str(getattr(options, "images", ""))

    @property
    def absent(self) -> str | None:
        """What to put where, if nothing is there."""
        needed = self.card.items.archive is not None and not (self.folder.is_dir() and any(self.folder.iterdir()))
        return f"put {self.card.items.access} into {self.folder}, then `unifork use` again" if needed else None

    def path(self, *patterns: str) -> Path:
        """The first file that one of some globs names. Raises DataError where there is none."""
        found = [path for pattern in patterns for path in sorted(self.folder.glob(pattern))]
        if not found:
            raise DataError(f"{self.folder}: no {' or '.join(patterns)}: put {self.card.items.access} there")
        return found[0]

    def check(self) -> dict[str, str]:
        """Hashes of the files that the card names. Raises DataError for another file."""
        found = {name: file_sha256(self.path(name)) for name in self.card.items.sha256}
        for name, digest in found.items():
            if digest != (wanted := self.card.items.sha256[name]):
                raise DataError(f"{self.folder / name}: sha256 is {digest}, the card {self.card.name} wants {wanted}")
        return found

    def json(self, *patterns: str) -> Any:
        """The content of the first file that is found."""
        return read_json(self.path(*patterns))

    def table(self, pattern: str = "**/*.parquet") -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows of all Parquet or TSV files without their images, each with the name of its image."""
        for path in sorted(self.folder.glob(pattern)):
            for number, row in enumerate(table_rows(path)):
                yield f"{path.relative_to(self.folder)}#{number}", row

    def image(self, name: str) -> bytes:
        """The bytes of an image. Raises DataError."""
        file, mark, number = name.partition("#")
        try:
            if mark:
                return _held(self.folder / file, int(number))
            if leaves(name):
                raise DataError("leads out of the folder")
            return read_below((self.folder / self.images).resolve(), name, MAX_IMAGE_BYTES)
        except (OSError, ValueError, TypeError, LookupError, EOFError, DataError) as error:
            raise DataError(str(error)) from None


class Row(dict[str, Any]):
    """An object of a file, which shows itself where a key is missing."""

    def __missing__(self, key: str) -> Any:
        raise LookupError(f"no {key!r} in {dict(self)!r:.200}")


def read_text(path: Path) -> str:
    """A file in UTF-8 or, by its first bytes, UTF-16; perhaps compressed by gzip. Raises DataError naming it.

    What is not UTF-8 is kept as lone surrogates: an answer may hold anything.
    """
    with refusing(DataError, path, OSError, ValueError, EOFError):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode(json.detect_encoding(data), errors="surrogateescape")


def read_json(path: Path) -> Any:
    """A file of JSON, or a list of one value per line; perhaps compressed by gzip. Raises DataError naming it."""
    text, rows = read_text(path), []
    try:
        return json.loads(text, object_hook=Row)
    except ValueError as error:
        whole = error
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line, object_hook=Row)] if line.strip() else []
        except ValueError as error:
            why = f"{whole}; line {number}: {error}"
            raise DataError(f"{path}: neither JSON nor a JSON value per line: {why}") from None
    return rows


@lru_cache(2)
def table_rows(path: Path) -> list[Row]:
    """A Parquet file without its images, or a TSV, whose rows are texts, with them. Raises DataError for torn rows."""
    if path.suffix == ".tsv":
        csv.field_size_limit(2 * MAX_IMAGE_BYTES)
        rows = [Row(row) for row in csv.DictReader(StringIO(read_text(path), newline=""), delimiter="\t")]
        if torn := [f"row {number}" for number, row in enumerate(rows, 1) if None in (*row, *row.values())]:
            raise DataError(f"{path}: {faults('rows have not as many fields as the first line', torn)}")
        return rows
    columns = [name for name in pq.read_schema(path).names if name != HELD]
    return [Row(row) for row in pq.read_table(path, columns=columns).to_pylist()]


@lru_cache(2)
def _column(path: Path) -> Any:
    return pq.read_table(path, columns=[HELD])[HELD]


def _held(path: Path, number: int) -> bytes:
    """The image of a row: of bytes, of the Hub's structure, the first of a list of them, or base64."""
    if path.suffix != ".tsv":
        held = _column(path)[number].as_py()
        held = held[0] if isinstance(held, list) else held
        return bytes(held["bytes"] if isinstance(held, dict) else held)
    text = table_rows(path)[number][HELD]
    if len(text) <= LONGEST_INDEX:
        text = next(row[HELD] for row in table_rows(path) if row["index"] == text)
    return base64.b64decode(text, validate=True)
