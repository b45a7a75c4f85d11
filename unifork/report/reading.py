"""The files that earlier stages leave behind, as plain values.

In: a path. Out: the file's content, or nothing where the stage has not run. A file that exists but is cut short or of
another form raises a DataError that names it: a report that leaves out what it cannot read would lie. What a report
does not show is not looked at, so that stages may write more than it knows.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
from pydantic import TypeAdapter, ValidationError

from unifork.errors import DataError
from unifork.evaluation.scoring import METRICS
from unifork.evaluation.statistics import Score
from unifork.layout import Layout

Content = TypeVar("Content")
DAMAGE = (OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile)
"""What reading bytes raises that are not what they should be."""
WORDS = ("track", "documents_hash", "part", "dataset", "task")
"""Columns of a history that hold no numbers."""


class Found(dict[str, Any]):
    """An object of a JSON file. Asked for a key that it lacks, it raises the DataError that names its file."""

    def __init__(self, path: Path, plain: Any) -> None:
        super().__init__(plain)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise damaged(self._path, f"no {key!r} among {', '.join(self)}")


def damaged(path: Path, what: str) -> DataError:
    """The error for a file that cannot be used."""
    return DataError(f"{path}: damaged: {what}. Delete it and run the stage that writes it again.")


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Raise DataError, which names the file, where what is done inside fails on its content."""
    try:
        yield
    except ValidationError as error:
        fault = error.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    except DAMAGE as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from None


def read(path: Path, form: Callable[[bytes], Content]) -> Content | None:
    """What `form` makes of a file. Raises DataError where it fails."""
    with undamaged(path):
        return form(path.read_bytes()) if path.exists() else None


def read_json(path: Path) -> Found | None:
    """A file that is one JSON object."""
    return read(path, partial(_found, path))


def read_records(path: Path) -> list[Found]:
    """A file of one JSON object per line."""
    return read(path, lambda data: [_found(path, line) for line in data.splitlines()]) or []


def read_scores(path: Path) -> dict[tuple[str, str], Score]:
    """The scores of a benchmark by split and name."""
    form = TypeAdapter(Score)
    with undamaged(path):
        return {
            (split, name): form.validate_python({**row, "name": name, "split": split})
            for split, table in (read_json(path) or {}).items()
            for name, row in table.items()
        }


def scores_by_seed(layout: Layout, names: Mapping[int, str], name: str) -> dict[int, dict[tuple[str, str], Score]]:
    """The scores of a benchmark by training seed; none of those that are not there yet. names: of variants, by seed."""
    return {seed: read_scores(layout.scores(variant) / name / METRICS) for seed, variant in names.items()}


def read_history(path: Path) -> list[Found]:
    """The steps of a training stage; values that a step does not have (a loss of the other task) are left out."""

    def steps(data: bytes) -> list[Found]:
        if not data.endswith(b"\n"):
            raise ValueError("it ends in the middle of a line")
        rows = csv.DictReader(data.decode().splitlines(), strict=True)
        return [
            Found(path, {name: text if name in WORDS else float(text) for name, text in row.items() if text})
            for row in rows
        ]

    return read(path, steps) or []


def last_validation(path: Path) -> list[Found]:
    """What a finished stage lost on held-out rows at its end, a row for each part."""
    rows = read_history(path)
    return [row for row in rows if row["finished_steps"] == rows[-1]["finished_steps"]]


def read_codes(path: Path, images: int, name: str = "codes") -> np.ndarray | None:
    """The codes (images, N, D) of an `.npz` file. Raises DataError when there are more or fewer images."""

    def codes(data: bytes) -> np.ndarray:
        found: np.ndarray = np.load(BytesIO(data))[name]
        if found.ndim != 3 or len(found) != images or found.dtype.kind not in "iu":
            raise ValueError(f"{found.dtype} of shape {found.shape}; allowed are integers of shape ({images}, N, D)")
        return found

    return read(path, codes)


def _found(path: Path, text: bytes) -> Found:
    plain = json.loads(text, object_hook=partial(Found, path))
    if not isinstance(plain, Found):
        raise ValueError(f"{type(plain).__name__} instead of an object")
    return plain
