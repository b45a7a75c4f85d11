"""The files and folders that a card names: found, checked, opened."""

import gzip
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unifork.errors import ConfigError, DataError
from unifork.shards.task import Slice


class ChangedFile(DataError):
    """A file that is gone, or another than the one that was planned with; planning again is what helps."""


_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY", re.IGNORECASE)
_READERS = {
    (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".jsonl.tgz", ".json"): (
        "tables and lists are read by table"
    ),
    (".tar", ".tgz", ".tar.gz"): "tars of images and texts are read by pairs",
}
"""Endings of files, and which kind of source reads them."""


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
    try:
        found = path.exists()
    except (OSError, ValueError):  # too long a name, or letters that no name has
        found = False
    if not found:
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
        paths = [path for path in root.rglob("*") if path.name.lower().endswith(endings)]
    else:
        paths = list(root.glob(pattern))
    found = sorted((path.relative_to(root).as_posix(), path) for path in paths if not path.name.startswith("."))
    if not found:
        raise ConfigError(
            f"{text!r}: no such file or folder, nothing that matches, or nothing that ends in {' '.join(endings)} "
            f"(relative paths start in {os.getcwd()!r})"
        )
    return found


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
    return gzip.open(path, mode, **how) if path.suffix == ".gz" else open(path, mode, **how)


def without_suffix(name: str) -> str:
    """A file's name without its kind, for keys: `a/sa_000001.tar.gz` -> `a/sa_000001`."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.split(".")[0] or base)
