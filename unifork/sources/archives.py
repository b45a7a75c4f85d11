"""Folders, tars and tars inside tars as one thing: named files, one after another, each of which can be read.

Memory holds the names of one archive and one file. A plain tar is walked header by header and read by seeking; a
compressed one is decompressed once by who reads as it goes, and once more by who lists it first. What breaks off is
told by a fault at the end, and what came before it is still there.
"""

import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from unifork.sources import RowError, without_suffix

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Endings of members that are images. What is inside decides how they are decoded, not the ending."""
ARCHIVES = (".tar", ".tgz", ".tar.gz")
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error)
"""What reading a damaged archive raises."""

File = tuple[str, Callable[[], bytes]]
"""Name of a file, and what reads it while its archive is open; raises one of BROKEN."""


@contextmanager
def opened(path: Path, inner: str | None = None) -> Iterator[Iterator[File | RowError]]:
    """The files of a folder (sorted) or tar, or of the tar named `inner` inside a tar, in its order.

    Damage is not raised: a fault comes last where there may have been more files.
    """
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and not _hidden(p.name))
        yield ((name, (path / name).read_bytes) for name in names)
        return
    with ExitStack() as stack:
        try:
            tar = stack.enter_context(tarfile.open(path))
            if inner is not None:
                tar = stack.enter_context(tarfile.open(fileobj=tar.extractfile(inner)))
            files = _files(tar)
        except (*BROKEN, KeyError) as error:
            files = iter([RowError(path.name, "broken_archive", _told(error))])
        yield files


def _files(tar: tarfile.TarFile) -> Iterator[File | RowError]:
    try:
        for member in tar:
            if member.isfile() and not _hidden(member.name):
                yield member.name.removeprefix("./"), partial(_read, tar, member)
        file: Any = tar.fileobj
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
            raise EOFError("it ends, or a header is damaged, before the empty block that closes a tar")
    except BROKEN as error:
        yield RowError(str(tar.name), "broken_archive", _told(error))


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")  # `._x.jpg` are what macOS leaves in archives


def is_image(name: str) -> bool:
    """Whether a member is an image by its name."""
    return name.lower().endswith(IMAGES)


Sample = tuple[str, dict[str, Callable[[], bytes]]]
"""Key, and what reads its `image` and its `text`."""


def samples_in(files: Iterable[File | RowError], place: str, text: str | None = None) -> list[Sample | RowError]:
    """Files of one name, `text` being the ending of texts, in the order of the first; then what cannot be used.

    These faults are second files of a name, and what broke off.
    """
    found: dict[str, dict[str, Callable[[], bytes]]] = {}
    faults = []
    prefix = "" if place == "." else without_suffix(place) + "/"
    for file in files:
        if isinstance(file, RowError):
            faults.append(replace(file, key=place))
            continue
        name, read = file
        ending = name.rpartition("/")[2].partition(".")[2].lower()
        role = "image" if is_image(name) else "text" if ending == text else None
        if role and found.setdefault(prefix + without_suffix(name), {}).setdefault(role, read) is not read:
            detail = f"{name!r} comes a second time in {place}"
            faults.append(RowError(prefix + without_suffix(name), "duplicate_key", detail))
    return [*found.items(), *faults]


def contents(samples: Iterable[Sample | RowError]) -> Iterator[tuple[str, dict[str, bytes]] | RowError]:
    """Samples with the bytes of `image` and `text`; faults stay."""
    for sample in samples:
        if isinstance(sample, RowError):
            yield sample
            continue
        try:
            yield sample[0], {role: read() for role, read in sample[1].items()}
        except BROKEN as error:
            yield RowError(sample[0], "broken_archive", _told(error))


# --------------------------------------------------------------------------- images named in lists


def picked(root: Path, paths: list[str]) -> Iterator[tuple[int, bytes | RowError]]:
    """(i, bytes or fault) of every path of a list, in any order; each archive that is touched is read once.

    `000/x.jpg` is the file `root/000/x.jpg`, or a member of `root/000.tar`, `.tgz` or `.tar.gz`, with or
    without the folder in its name. Leading `./` go; a path that leaves the root is a fault.
    """
    waiting: dict[Path, dict[str, list[int]]] = {}
    for number, text in enumerate(paths):
        name = PurePosixPath(text)
        if name.is_absolute() or ".." in name.parts:
            yield number, RowError(text, "path_outside", f"{text!r} leaves the folder of the images")
        elif (root / name).is_file():
            try:
                yield number, (root / name).read_bytes()
            except OSError as error:
                yield number, RowError(text, "missing_image", str(error.strerror))
        else:
            archives = (root / (name.parts[0] + ending) for ending in ARCHIVES if len(name.parts) > 1)
            if archive := next(filter(Path.is_file, archives), None):
                waiting.setdefault(archive, {}).setdefault(str(name), []).append(number)
            else:
                why = f"{text!r}: it is neither a file nor a member of an archive"
                yield number, RowError(text, "missing_image", why)
    for archive, wanted in waiting.items():
        yield from _from_archive(archive, wanted)


def _from_archive(path: Path, wanted: dict[str, list[int]]) -> Iterator[tuple[int, bytes | RowError]]:
    left, why = dict(wanted), f"not in {path.name}"
    with opened(path) as files:
        for file in files:
            if isinstance(file, RowError):
                why = f"{path.name} breaks off: {file.detail}"
                break
            name = file[0] if file[0] in left else f"{path.name.split('.')[0]}/{file[0]}"
            if name in left:
                try:
                    data = file[1]()
                except BROKEN as error:
                    why = f"{path.name} breaks off: {_told(error)}"
                    break
                yield from ((number, data) for number in left.pop(name))
            if not left:
                return
    for text, numbers in left.items():
        yield from ((number, RowError(text, "missing_image", f"{text!r}: {why}")) for number in numbers)
