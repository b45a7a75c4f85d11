"""Pictures with a text of the same name: WebDataset tars (BLIP3o-60k), SA-1B tars or folders with captions apart.

A sample is every member whose name agrees up to the first dot of its last part, wherever in the archive
they lie. Its key is the archive and that name.
"""

from collections.abc import Iterator
from pathlib import Path

from unifork.errors import ConfigError
from unifork.shards.task import Slice
from unifork.sources import (
    Fault,
    Row,
    Source,
    SourceOptions,
    as_planned,
    check_ending,
    cut,
    file_named,
    files_of,
    located,
    picture_row,
    without_suffix,
)
from unifork.sources.archives import ARCHIVES, BROKEN, Box, is_picture, opened


class PairOptions(SourceOptions):
    """What a card says of such a set."""

    files: str
    """Tars (globs are allowed), or a folder of tars, of folders, or of the pictures themselves."""
    text: str = "txt"
    """Ending of the members that are texts."""
    captions: str | None = None
    """Where the texts are when they lie apart: a folder or tar of `<name of the picture>.<text>`."""
    column: str = "caption"
    """Text column that they become."""


def _containers(files: str) -> list[tuple[str, Path]]:
    """(name, path) of every tar; without tars of every folder, or of the one folder that holds the pictures itself."""
    try:
        found = files_of(files, ARCHIVES)
    except ConfigError:
        root = located(files)
        entries = sorted(root.iterdir())
        if any(is_picture(entry.name) for entry in entries):
            return [(".", root)]
        folders = [(entry.name, entry) for entry in entries if entry.is_dir()]
        found = folders or [(entry.name, entry) for entry in entries]
    for name, path in found:
        if path.is_file():
            check_ending(name, ARCHIVES)
    return found


def slices(known: PairOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards of every archive, in the order of their names."""
    if known.captions:
        located(known.captions)
    for name, path in _containers(known.files):
        with opened(path) as box:
            count = len(_samples(box, name, known))
        yield from cut(count, shard_rows, file=name, bytes=0 if path.is_dir() else path.stat().st_size)


def rows(known: PairOptions, piece: Slice, _seed: int) -> Iterator[Row | Fault]:
    """The samples of one slice."""
    with opened(as_planned(file_named(known.files, piece), piece)) as box:
        chosen = _samples(box, piece.file or "", known)[piece.start : piece.stop]
        apart = None
        if known.captions:
            apart = _texts_apart(located(known.captions), [one[0] for one in chosen if isinstance(one, tuple)], known)
        for one in chosen:
            yield one if isinstance(one, Fault) else _row(box, *one, known.column, apart)


Sample = tuple[str, dict[str, int]]
"""Key, and the member numbers of `picture` and `text`."""


def _samples(box: Box, place: str, known: PairOptions) -> list[Sample | Fault]:
    """Samples in the order of their first member; then, as faults, second members and what broke off."""
    found: dict[str, dict[str, int]] = {}
    faults = []
    prefix = "" if place == "." else without_suffix(place) + "/"
    for number, name in enumerate(box.names):
        ending = name.rpartition("/")[2].partition(".")[2].lower()
        role = "picture" if is_picture(name) else "text" if ending == known.text and not known.captions else None
        if role is None:
            continue
        key = prefix + without_suffix(name)
        if found.setdefault(key, {}).setdefault(role, number) != number:
            faults.append(Fault(key, "duplicate_key", f"{name!r} comes a second time in {place}"))
    if box.fault:
        faults.append(Fault(place, "broken_archive", box.fault))
    return [*found.items(), *faults]


def _row(box: Box, key: str, members: dict[str, int], column: str, apart: dict[str, bytes] | None) -> Row | Fault:
    try:
        image = box.read(members["picture"]) if "picture" in members else None
        raw = box.read(members["text"]) if "text" in members else (apart or {}).get(key)
        text = None if raw is None else raw.decode("utf-8").strip()
    except BROKEN as error:
        return Fault(key, "broken_archive", f"{type(error).__name__}: {error}")
    except UnicodeDecodeError as error:
        return Fault(key, "broken_text", str(error))
    if image is None:
        return Fault(key, "missing_picture", "its archive has a text of that name, but no picture")
    if text is None:
        return Fault(key, "missing_caption", "a picture of that name, but no text")
    return picture_row(key, image, **{column: text})


def _texts_apart(path: Path, keys: list[str], known: PairOptions) -> dict[str, bytes]:
    """The texts of some keys from a folder, read by name, or from a tar, read through once."""
    wanted = {f"{key.rpartition('/')[2]}.{known.text}": key for key in keys}
    if path.is_dir():
        return {key: (path / name).read_bytes() for name, key in wanted.items() if (path / name).is_file()}
    with opened(path) as box:
        bases = ((number, name.rpartition("/")[2]) for number, name in enumerate(box.names))
        return {wanted[base]: box.read(number) for number, base in bases if base in wanted}


SOURCE = Source(PairOptions, slices, rows, paths=("files", "captions"))
