"""The files that earlier stages leave behind, in the forms that their writers have, too.

In: a path and a form. Out: the file's content, or nothing where the stage has not run. A file that exists but is cut
short or lacks something raises a DataError that names it: a report that leaves out what it cannot read would lie. What
a form does not have is not looked at, so that stages may write more than readers know.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, get_type_hints
from zipfile import BadZipFile

import numpy as np
from pydantic import TypeAdapter, ValidationError

from unifork.errors import DataError
from unifork.evaluation.scoring import METRICS
from unifork.evaluation.statistics import Score
from unifork.layout import Layout
from unifork.training.tables import HeldOutPart, Step

Content = TypeVar("Content")
DAMAGE = (OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile)
"""What reading bytes raises that are not what they should be."""

Row = Mapping[str, Any]


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Raise DataError, which names the file, where what is done inside fails on its content."""
    try:
        yield
    except DAMAGE as error:
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            fault = error.errors()[0]
            what = ": ".join(filter(None, [".".join(map(str, fault["loc"])), fault["msg"]]))
        raise DataError(f"{path}: damaged: {what}. Delete it and run the stage that writes it again.") from None


def read(path: Path, form: Callable[[bytes], Content]) -> Content | None:
    """What `form` makes of a file. Raises DataError where it fails."""
    with undamaged(path):
        return form(path.read_bytes()) if path.exists() else None


def read_json(path: Path, form: type[Content]) -> Content | None:
    """A JSON file."""
    return read(path, TypeAdapter(form).validate_json)


def read_lines(path: Path, form: type[Content]) -> list[Content]:
    """A file with some JSON on each line."""
    line = TypeAdapter(form)
    return read(path, lambda data: [line.validate_json(text) for text in data.splitlines()]) or []


def read_scores(path: Path) -> dict[tuple[str, str], Score]:
    """The scores of a benchmark by split and name."""
    form, tables = TypeAdapter(Score), read_json(path, dict[str, dict[str, dict[str, Any]]]) or {}
    with undamaged(path):
        return {
            (split, name): form.validate_python({**row, "name": name, "split": split})
            for split, table in tables.items()
            for name, row in table.items()
        }


def scores_by_seed(layout: Layout, names: Mapping[int, str], name: str) -> dict[int, dict[tuple[str, str], Score]]:
    """The scores of a benchmark by training seed; none of those that are not there yet. names: of variants, by seed."""
    return {seed: read_scores(layout.scores(variant) / name / METRICS) for seed, variant in names.items()}


def read_history(path: Path, form: type[Step | HeldOutPart] = Step) -> list[Row]:
    """The steps of a training stage; values that a step does not have (a loss of the other task) are left out.

    form: the columns that every row has; of those that hold no words, and of all others, the values are numbers.
    """
    kinds, whole = get_type_hints(form), TypeAdapter(form)

    def steps(data: bytes) -> list[Row]:
        if not data.endswith(b"\n"):
            raise ValueError("it ends in the middle of a line")
        table = csv.DictReader(data.decode().splitlines(), strict=True)
        rows = [{name: text for name, text in row.items() if text} for row in table]
        return [
            whole.validate_python(row) | {name: float(text) for name, text in row.items() if name not in kinds}
            for row in rows
        ]

    return read(path, steps) or []


def last_validation(path: Path) -> list[Row]:
    """What a finished stage lost on held-out rows at its end, a row for each part."""
    rows = read_history(path, HeldOutPart)
    return [row for row in rows if row["finished_steps"] == rows[-1]["finished_steps"]]


def read_codes(path: Path, images: int, name: str = "codes") -> np.ndarray | None:
    """The codes (images, N, D) of an `.npz` file. Raises DataError when there are more or fewer images."""

    def codes(data: bytes) -> np.ndarray:
        found: np.ndarray = np.load(BytesIO(data))[name]
        if found.ndim != 3 or len(found) != images or found.dtype.kind not in "iu":
            raise ValueError(f"{found.dtype} of shape {found.shape}; allowed are integers of shape ({images}, N, D)")
        return found

    return read(path, codes)
