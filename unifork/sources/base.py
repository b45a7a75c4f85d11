"""What all kinds of source share: rows and faults, slices of files, paths that a card names.

A source plans slices (which rows of which file become one shard) and yields the rows of one slice.
A slice never spans two files, so that a file added at the end makes no finished shard anew.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unifork.errors import ConfigError, DataError

Row = dict[str, Any]
Task = dict[str, Any]
Slice = dict[str, Any]
"""`start` and `stop` of a shard's rows, and what says where they lie: plain data, part of the fingerprint."""
Options = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """An entry of a source of which no row can be made: it is counted and goes to the quarantine."""

    key: str
    reason: str
    detail: str
    image: bytes = b""


@dataclass(frozen=True)
class Source:
    """A kind of source: `slices(options, shard_rows)` plans it in order, `rows(task)` reads one slice."""

    slices: Callable[[Options, int], Iterator[Slice]]
    rows: Callable[[Task], Iterator[Row | Fault]]
    paths: tuple[str, ...] = ()
    """Options that name files or folders."""
    endless: bool = False
    """It makes as many rows as are asked for."""


def cut(count: int, shard_rows: int, **where: Any) -> Iterator[Slice]:
    """Consecutive slices of at most `shard_rows` of a file's `count` entries."""
    for start in range(0, count, shard_rows):
        yield {**where, "start": start, "stop": min(start + shard_rows, count)}


def picture_row(key: str, image: bytes, **more: Any) -> Row:
    """A row around a picture as received; a picture that cannot be read has no sides (the filter names it)."""
    try:
        with Image.open(io.BytesIO(image)) as picture:
            width, height = picture.size
    except Exception:  # any decoder may raise anything on hostile bytes
        width = height = 0
    sha256 = hashlib.sha256(image).hexdigest()
    return {"key": key, "image": image, "width": width, "height": height, "url": "", "sha256": sha256, **more}


# ------------------------------------------------------------------------------------------- paths

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY", re.IGNORECASE)


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
        paths = [one for one in root.rglob("*") if one.name.lower().endswith(endings)]
    else:
        paths = list(root.glob(pattern))
    found = sorted((one.relative_to(root).as_posix(), one) for one in paths if not one.name.startswith("."))
    if not found:
        raise ConfigError(
            f"{text!r}: no such file or folder, nothing that matches, or nothing that ends in {' '.join(endings)} "
            f"(relative paths start in {os.getcwd()!r})"
        )
    return found


def file_named(text: str, name: str) -> Path:
    """The path of one of `files_of(text)` by its name, without looking at the others."""
    root, _ = _root(text)
    return root if root.is_file() else root / name


def as_planned(path: Path, task: Task) -> Path:
    """The file of a slice. Raises DataError when it is gone or has another size than when it was planned."""
    size = path.stat().st_size if path.is_file() else 0 if path.is_dir() else None
    if size != task["bytes"]:
        raise DataError(f"{path.name}: {size} bytes, {task['bytes']} when the shards were planned; run the stage again")
    return path


def _root(text: str) -> tuple[Path, str | None]:
    """The part of a path before its first wild card, and the rest."""
    path = expanded(text)
    wild = next((number for number, part in enumerate(path.parts) if re.search(r"[*?\[]", part)), None)
    if wild is None or path.exists():
        return path, None
    return Path(*path.parts[:wild]), str(Path(*path.parts[wild:]))


def without_suffix(name: str) -> str:
    """A file's name without its kind, for keys: `a/sa_000001.tar.gz` -> `a/sa_000001`."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.split(".")[0] or base)
