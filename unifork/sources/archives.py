"""Folders, tars and tars inside tars as one thing: a list of named files that can be read one by one.

Memory holds the names of one archive and one file. A plain tar is walked header by header and read by
seeking; a compressed one is decompressed once to list it and once to read from it. What breaks off is
told (`fault`), and what came before it is still there.
"""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from unifork.sources import Fault

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Endings of members that are pictures. What is inside decides how they are decoded, not the ending."""
ARCHIVES = (".tar", ".tgz", ".tar.gz")
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error)
"""What reading a damaged archive raises."""


@dataclass(frozen=True)
class Box:
    """Named files, in the order of the archive (sorted for a folder)."""

    names: list[str]
    read: Callable[[int], bytes]
    """The bytes of file number i; raises one of BROKEN."""
    fault: str | None = None
    """Why the rest of the archive cannot be listed."""


@contextmanager
def opened(path: Path, inner: str | None = None) -> Iterator[Box]:
    """A folder or tar, or the tar named `inner` inside a tar. Damage is told in the box, not raised."""
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and not _hidden(p.name))
        yield Box(names, lambda number: (path / names[number]).read_bytes())
        return
    try:
        tar = tarfile.open(path)  # noqa: SIM115 - a damaged tar must not end the block of the caller
    except BROKEN as error:
        yield _nothing(error)
        return
    with tar:
        if inner is None:
            yield _box(tar)
            return
        try:
            nested = tarfile.open(fileobj=tar.extractfile(inner))  # noqa: SIM115
        except (*BROKEN, KeyError) as error:
            yield _nothing(error)
            return
        with nested:
            yield _box(nested)


def _nothing(error: Exception) -> Box:
    return Box([], lambda _: b"", f"{type(error).__name__}: {error}")


def _box(tar: tarfile.TarFile) -> Box:
    members: list[tarfile.TarInfo] = []
    fault = None
    try:
        for member in _files(tar):
            members.append(member)  # one by one: those before a fault stay
        if not _closed(tar):
            fault = "it ends, or a header is damaged, before the empty block that closes a tar"
    except BROKEN as error:
        fault = f"{type(error).__name__}: {error}"

    def read(number: int) -> bytes:
        file = tar.extractfile(members[number])
        return file.read() if file else b""

    return Box([member.name.removeprefix("./") for member in members], read, fault)


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    return (member for member in tar if member.isfile() and not _hidden(member.name))


def _closed(tar: tarfile.TarFile) -> bool:
    """Whether a tar that was walked ends as it should: tarfile takes a damaged header for the end."""
    file: Any = tar.fileobj
    file.seek(tar.offset)
    return bool(file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE))


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")  # `._x.jpg` are what macOS leaves in archives


def is_picture(name: str) -> bool:
    """Whether a member is a picture by its name."""
    return name.lower().endswith(PICTURES)


def pictures_in(box: Box, place: str) -> list[tuple[str, int] | Fault]:
    """(name, number) of the pictures of a box; after them, as faults, names that occur again and what broke off."""
    seen: dict[str, int] = {}
    faults = []
    for number, name in enumerate(box.names):
        if is_picture(name) and seen.setdefault(name, number) != number:
            faults.append(Fault(f"{place}/{name}", "duplicate_key", "a member of that name came before"))
    if box.fault:
        faults.append(Fault(place, "broken_archive", box.fault))
    return [*seen.items(), *faults]


# --------------------------------------------------------------------------- pictures named in lists


def picked(root: Path, paths: list[str]) -> Iterator[tuple[int, bytes | Fault]]:
    """(i, bytes or fault) of every path of a list, in any order; each archive that is touched is read once.

    `000/x.jpg` is the file `root/000/x.jpg`, or a member of `root/000.tar`, `.tgz` or `.tar.gz`, with or
    without the folder in its name. Leading `./` go; a path that leaves the root is a fault.
    """
    waiting: dict[Path, dict[str, list[int]]] = {}
    for number, text in enumerate(paths):
        name = PurePosixPath(text)
        if name.is_absolute() or ".." in name.parts:
            yield number, Fault(text, "path_outside", f"{text!r} leaves the folder of the pictures")
        elif (root / name).is_file():
            yield number, _loose(root / name, text)
        elif len(name.parts) > 1 and (archive := _archive(root, name.parts[0])):
            waiting.setdefault(archive, {}).setdefault(str(name), []).append(number)
        else:
            yield number, _missing(text)
    for archive, wanted in waiting.items():
        yield from _from_archive(archive, wanted)


def _loose(path: Path, text: str) -> bytes | Fault:
    try:
        return path.read_bytes()
    except OSError as error:
        return Fault(text, "missing_picture", str(error.strerror))


def _missing(text: str, why: str = "it is neither a file nor a member of an archive") -> Fault:
    return Fault(text, "missing_picture", f"{text!r}: {why}")


def _archive(root: Path, first: str) -> Path | None:
    return next((path for suffix in ARCHIVES if (path := root / (first + suffix)).is_file()), None)


def _from_archive(path: Path, wanted: dict[str, list[int]]) -> Iterator[tuple[int, bytes | Fault]]:
    left, why = dict(wanted), f"not in {path.name}"
    try:
        with tarfile.open(path) as tar:
            for member in _files(tar):
                name = member.name.removeprefix("./")
                name = name if name in left else f"{path.name.split('.')[0]}/{name}"
                file = tar.extractfile(member) if name in left else None
                if file:
                    data = file.read()
                    yield from ((number, data) for number in left.pop(name))
                    if not left:
                        return
    except BROKEN as error:
        why = f"{path.name} breaks off: {type(error).__name__}: {error}"
    for text, numbers in left.items():
        yield from ((number, _missing(text, why)) for number in numbers)
