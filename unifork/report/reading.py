"""The files that earlier stages leave behind, as typed values.

In: a path. Out: the file's content, or None where the stage has not run. A file that exists but is cut short, of
another form or of another kind raises DataError naming it: a report that leaves out what it cannot read would lie.
Keys that a report does not show are ignored, so that stages may write more than it knows.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from unifork.config import Stage
from unifork.errors import DataError
from unifork.evaluation.statistics import Score

Content = TypeVar("Content")


class Read(BaseModel):
    """Base of every file format here: frozen, further keys ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class DepthUse(Read):
    """How one depth uses the codebook."""

    rows_used: int
    perplexity: float


class CodeUse(Read):
    """How a group of pictures uses the codebook."""

    rows_used: int
    bits_per_position: float
    depths: tuple[DepthUse, ...]


class Reconstruction(Read):
    """What codes lose of a group of pictures."""

    mean_absolute_levels: float
    psnr_db: float
    codes: CodeUse


class Same(Read):
    """From how many reconstructions the detector reads the same objects as from the originals."""

    same: int
    total: int


class Measures(Reconstruction):
    """The image tokenizer's own report."""

    images: int
    groups: dict[str, Reconstruction]
    detector: dict[str, Same] = {}


class Documents(Read):
    """One part of a mixture as a stage met it."""

    dataset: str
    template: str
    usable: int
    seen: int


class Tensor(Read):
    """One tensor of a model."""

    shape: tuple[int, ...]
    trained: bool


class Summary(Read):
    """What a training stage says of itself."""

    stage: Stage
    quarantined: dict[str, int]
    documents: dict[str, tuple[Documents, ...]]
    tensors: dict[str, Tensor]


class Finished(Read):
    """The note of a finished run; untracked, so it may be missing."""

    seconds: float


class Drawn(Read):
    """One prompt, and what was seen on the picture drawn for it."""

    prompt: str
    kind: str
    split: str
    correct: bool
    faults: tuple[str, ...]


class Answered(Read):
    """One question, and what was answered."""

    picture: str
    kind: str
    split: str
    question: str
    expected: str
    answer: str
    correct: bool


@dataclass(frozen=True)
class Step:
    """One optimizer step; values that it does not have (a loss of the other task) are left out."""

    track: str
    step: int
    values: dict[str, float]


SAMPLES: dict[str, TypeAdapter[Any]] = {"prompt": TypeAdapter(list[Drawn]), "question": TypeAdapter(list[Answered])}
"""Samples that a report can show, by a key that tells them apart."""


def read_json(path: Path, form: TypeAdapter[Content] | type[Content]) -> Content | None:
    """A JSON file of a known form."""
    text = _text(path)
    return None if text is None else _validated(form, lambda: json.loads(text), path)


def read_scores(path: Path) -> list[Score]:
    """The scores of a benchmark, which lie in a table by split and name; none where it has not run."""
    tables = read_json(path, TypeAdapter(dict[str, dict[str, dict[str, Any]]])) or {}
    rows = [row | {"name": name, "split": split} for split, table in tables.items() for name, row in table.items()]
    scores: list[Score] = _validated(TypeAdapter(list[Score]), lambda: rows, path)
    return scores


def read_samples(path: Path) -> list[Drawn] | list[Answered]:
    """The samples of a benchmark, one JSON value per line; none of a kind of benchmark that a report cannot show."""
    text = _text(path)
    lines = (text or "").splitlines()
    plain = _validated(TypeAdapter(list[dict[str, Any]]), lambda: [json.loads(line) for line in lines], path)
    form = next((form for key, form in SAMPLES.items() if plain and key in plain[0]), None)
    samples: list[Drawn] | list[Answered] = _validated(form, lambda: plain, path) if form else []
    return samples


def read_history(path: Path) -> list[Step]:
    """The steps of a training stage; none where it has not run."""
    text = _text(path)
    if text is None:
        return []
    steps: list[Step] = []
    if not text.endswith("\n"):
        raise _damaged(path, "it ends in the middle of a line")
    try:
        for row in csv.DictReader(text.splitlines(), strict=True):
            track, step = row.pop("track"), int(row.pop("step"))
            row.pop("documents_hash", None)  # for comparing two runs, not for curves
            steps.append(Step(track, step, {name: float(value) for name, value in row.items() if value}))
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"line {len(steps) + 2}: {error!r}") from None
    return steps


def read_codes(path: Path, pictures: int) -> np.ndarray | None:
    """The codes (pictures, N, D) of an `.npz` file. Raises DataError when there are more or fewer pictures."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            codes: np.ndarray = file["codes"]
    except (BadZipFile, KeyError, ValueError, OSError, EOFError) as error:
        raise _damaged(path, repr(error)) from None
    if codes.ndim != 3 or len(codes) != pictures or codes.dtype.kind not in "iu":
        raise _damaged(path, f"{codes.dtype} of shape {codes.shape}; allowed are integers of shape ({pictures}, N, D)")
    return codes


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, OSError) as error:
        raise _damaged(path, repr(error)) from None


def _validated(form: Any, plain: Any, path: Path) -> Any:
    adapter = form if isinstance(form, TypeAdapter) else TypeAdapter(form)
    try:
        return adapter.validate_python(plain())
    except json.JSONDecodeError as error:
        raise _damaged(path, str(error)) from None
    except ValidationError as error:
        fault = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: damaged: {what}. Delete it and run the stage that writes it again.")
