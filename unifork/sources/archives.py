"""Folders, tars and tars inside tars as one thing: named files, one after another, each of which can be read.

Memory holds the names of one archive and one file of bounded size. A plain tar is walked header by header and read by
seeking; a compressed one is decompressed once by who reads as it goes, and once more by who lists it first. What
breaks off is named by an error at the end, and what came before it is still there. A hard link is the file it links
to; what is no file, too large, or outside is an error for who reads it.
"""

import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from unifork.errors import Rejected, cause, rejected, tried
from unifork.sources import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    Row,
    RowError,
    leaves,
    named,
    oversize,
    row_of,
    without_kind,
)
from unifork.sources.files import hidden

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Endings of members that are images. What is inside decides how they are decoded, not the ending."""
ARCHIVES = (".tar", ".tgz", ".tar.gz")
HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
"""Blocks of a tar with a name or attributes of what follows, which `tarfile` holds in memory."""
MAX_HEADER_BYTES = 1024**2
"""Longest of them that is read."""

Read = Callable[[int], bytes]
"""What reads a file of at most some bytes while its archive is open; raises Rejected, or what is damaged raises."""
File = tuple[str, Read]
"""Name of a file, and what reads it."""


@contextmanager
def opened(path: Path, inner: str | None = None) -> Iterator[Iterator[File | Rejected]]:
    """The files of a folder (sorted) or tar, or of the first tar named `inner` inside a tar, in its order.

    Damage is not raised: an error comes last where there may have been more files.
    """
    if path.is_dir():
        yield _files_below(path)
        return
    with ExitStack() as stack:
        try:
            tar = stack.enter_context(open_tar(path))
            files = _members(tar)
            if inner is not None:
                found = [member for member in until_damage(tar) if member.name == inner]
                if not found:
                    raise tarfile.ReadError(f"no {inner!r} in it")
                again = [Rejected("duplicate_key", f"{inner!r} comes again in {path.name}")] * (len(found) - 1)
                tar = stack.enter_context(open_tar(fileobj=tar.extractfile(found[0])))
                files = iter([*_members(tar), *again])
        except Exception as error:
            files = iter([Rejected("broken_archive", cause(error))])
        yield files


class _Member(tarfile.TarInfo):
    """A member whose name and attributes have bounds."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a name or attributes of {self.size} bytes, at most {MAX_HEADER_BYTES} are read")
        return super()._proc_member(tar)  # type: ignore[misc]  # meant to be overridden, says its own comment


def open_tar(path: Path | None = None, fileobj: Any = None) -> tarfile.TarFile:
    """A tar, compressed or not, whose names are UTF-8 and have bounds."""
    return tarfile.open(path, fileobj=fileobj, encoding="utf-8", tarinfo=_Member)


def until_damage(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members before the place where a tar breaks off, if it does; reading them says so again."""
    try:
        yield from tar
    except Exception as error:
        cause(error)


def _members(tar: tarfile.TarFile) -> Iterator[File | Rejected]:
    earlier: dict[str, tarfile.TarInfo] = {}
    try:
        for member in tar:
            target = earlier.get(os.path.normpath(member.linkname)) if member.islnk() else member
            if target is not None:
                earlier[os.path.normpath(member.name)] = target
            if not member.isdir() and not hidden(member.name):
                yield member.name.removeprefix("./"), partial(_read_member, tar, target, member)
        file: Any = tar.fileobj
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
            raise EOFError("it ends, or a header is damaged, before the empty block that closes a tar")
    except Exception as error:
        yield Rejected("broken_archive", cause(error))


def _read_member(tar: tarfile.TarFile, target: tarfile.TarInfo | None, member: tarfile.TarInfo, most: int) -> bytes:
    if target is None or not target.isfile():
        link = f"a link to {member.linkname!r}" if member.linkname else f"of type {member.type!r}"
        raise Rejected("not_a_file", f"{member.name!r} is {link}")
    file = tar.extractfile(target)
    assert file is not None, f"{member.name}: a file without content"
    return _read(file, target.size, most)


def _files_below(folder: Path) -> Iterator[File | Rejected]:
    """What lies below a folder; links to folders are not followed."""
    root = folder.resolve()
    names: list[str] = []
    errors: list[Rejected] = []

    def unlisted(error: OSError) -> None:
        errors.append(Rejected("broken_archive", cause(error)))

    for place, folders, files in os.walk(folder, onerror=unlisted):
        beside = os.path.relpath(place, folder)
        names += [os.path.normpath(os.path.join(beside, name)) for name in files if not hidden(name)]
        folders[:] = (name for name in folders if not hidden(name))
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                detail = f"{os.path.join(beside, name)!r} is a link to a folder, which is not followed"
                errors.append(Rejected("not_a_file", detail))
    yield from ((name, partial(read_below, root, name)) for name in sorted(names))
    yield from errors


def read_below(root: Path, name: str, most: int) -> bytes:
    """A file below a folder, which is resolved. Raises Rejected, OSError or ValueError for a name that none has."""
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise Rejected("path_outside", f"{name!r} is a link that leaves {root.name!r}")
    if not path.is_file() and (path.exists() or os.path.islink(root / name)):
        raise Rejected("not_a_file", f"{name!r} is neither a file nor a link to one")
    with open(path, "rb") as file:
        return _read(file, path.stat().st_size, most)


def _read(file: Any, size: int, most: int) -> bytes:
    if too_large := oversize(size, most):
        raise too_large
    data: bytes = file.read(size)
    if len(data) < size:
        raise EOFError(f"{len(data)} bytes of {size}")
    return data


def is_image(name: str) -> bool:
    """Whether a member is an image by its name."""
    return name.lower().endswith(IMAGES)


Sample = tuple[str, dict[str, Read]]
"""Key, and what reads its `image` and its `text`."""
Contents = dict[str, bytes]
"""Bytes of `image` and `text`, as far as they are there."""


def samples_in(files: Iterable[File | Rejected], place: str, text: str | None = None) -> list[Sample | RowError]:
    """Files of one name, `text` being the ending of texts, in the order of the first; then what cannot be used.

    A name is what stands before the ending, and where that has no partner, before the first dot, as in WebDataset.
    These errors are names that lead out of the archive, second files of a name, and what broke off.
    """
    found: dict[str, dict[str, Read]] = {}
    errors: list[RowError] = []
    prefix = "" if place == "." else without_kind(place) + "/"
    members: list[tuple[str, str, str, Read]] = []
    for file in files:
        if isinstance(file, Rejected):
            errors.append(named(place, file))
        elif is_image(file[0]):
            members.append(("image", file[0].rpartition(".")[0], *file))
        elif text and file[0].lower().endswith(f".{text.lower()}"):
            members.append(("text", file[0][: -len(text) - 1], *file))
    stems = {role: {stem for its, stem, *_ in members if its == role} for role in MOST_BYTES}
    for role, whole, name, read in members:
        others, first = stems["text" if role == "image" else "image"], _before_dots(name)
        stem = whole if whole in others or first not in others else first
        if role == "text" and stem != whole:  # a further field of a sample
            continue
        if found.setdefault(stem, {}).setdefault(role, read) is not read:
            errors.append(RowError(prefix + stem, "duplicate_key", f"{name!r} is a second {role} of {stem!r}"))
    samples: list[Sample | RowError] = [
        RowError(prefix + name, "path_outside", f"{name!r} leads out of {place}")
        if leaves(name)
        else (prefix + name, readers)
        for name, readers in found.items()
    ]
    return [*samples, *errors]


def _before_dots(name: str) -> str:
    """`a/b.seg.png` -> `a/b`."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.split(".")[0] or base)


def rows_in(samples: Iterable[Sample | RowError], make: Callable[[str, Contents], Row]) -> Iterator[Row | RowError]:
    """The rows that `make` makes of keys and contents of samples; errors stay."""
    for sample in samples:
        if isinstance(sample, RowError):
            yield sample
            continue
        key, readers = sample
        yield row_of(key, tried(_read_all, readers, reason="broken_archive"), make)


def _read_all(readers: dict[str, Read]) -> Contents:
    return {role: read(MOST_BYTES[role]) for role, read in readers.items()}


MOST_BYTES = {"image": MAX_IMAGE_BYTES, "text": MAX_TEXT_BYTES}
"""Of a file, by what it is of a sample."""

# --------------------------------------------------------------------------- images named in lists


def picked(root: Path, paths: list[str]) -> Iterator[tuple[int, bytes | Rejected]]:
    """(i, bytes or error) of every path of a list, in any order; each archive that is touched is read once.

    `000/x.jpg` is the file `root/000/x.jpg`, or a member of `root/000.tar`, `.tgz` or `.tar.gz`, with or
    without the folder in its name. Leading `./` go; a path or link that leaves the root is an error.
    """
    waiting: dict[Path, dict[str, list[int]]] = {}
    folder = root.resolve()
    for number, text in enumerate(paths):
        name = PurePosixPath(text)
        if leaves(text):
            yield number, Rejected("path_outside", f"{text!r} leaves the folder of the images")
            continue
        try:
            yield number, read_below(folder, text, MAX_IMAGE_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            archives = (root / (name.parts[0] + ending) for ending in ARCHIVES if len(name.parts) > 1)
            if archive := next(filter(Path.is_file, archives), None):
                waiting.setdefault(archive, {}).setdefault(str(name), []).append(number)
            else:
                yield number, Rejected("missing_image", f"{text!r}: it is neither a file nor a member of an archive")
        except Exception as error:
            yield number, rejected(error, "missing_image")
    for archive, wanted in waiting.items():
        yield from _from_archive(archive, wanted)


def _from_archive(path: Path, wanted: dict[str, list[int]]) -> Iterator[tuple[int, bytes | Rejected]]:
    left, why = dict(wanted), f"not in {path.name}"
    with opened(path) as files:
        for file in files:
            if isinstance(file, Rejected):
                why = f"{path.name} breaks off: {file}"
                break
            name = file[0] if file[0] in left else f"{path.name.split('.')[0]}/{file[0]}"
            if name in left:
                found = tried(file[1], MAX_IMAGE_BYTES, reason="missing_image")
                yield from ((number, found) for number in left.pop(name))
            if not left:
                return
    for text, numbers in left.items():
        yield from ((number, Rejected("missing_image", f"{text!r}: {why}")) for number in numbers)
