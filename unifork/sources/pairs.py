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
)
from unifork.sources.archives import ARCHIVES, contents, is_picture, opened, samples_in


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
        found = [(entry.name, entry) for entry in sorted(root.iterdir())]
        if any(is_picture(name) for name, _ in found):
            return [(".", root)]
        found = [(name, path) for name, path in found if path.is_dir()] or found
    for name, path in found:
        if path.is_file():
            check_ending(name, ARCHIVES)
    return found


def slices(known: PairOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards of every archive, in the order of their names."""
    if known.captions:
        located(known.captions)
    for name, path in _containers(known.files):
        with opened(path) as files:
            count = len(samples_in(files, name, _ending(known)))
        yield from cut(count, shard_rows, file=name, bytes=0 if path.is_dir() else path.stat().st_size)


def rows(known: PairOptions, piece: Slice, _seed: int) -> Iterator[Row | Fault]:
    """The samples of one slice."""
    with opened(as_planned(file_named(known.files, piece), piece)) as files:
        chosen = samples_in(files, piece.file or "", _ending(known))[piece.start : piece.stop]
        apart = _texts_apart([one[0] for one in chosen if not isinstance(one, Fault)], known)
        for one in contents(chosen):
            yield one if isinstance(one, Fault) else _row(*one, known.column, apart)


def _ending(known: PairOptions) -> str | None:
    """That of the texts beside the pictures; None when they lie apart."""
    return None if known.captions else known.text


def _row(key: str, found: dict[str, bytes], column: str, apart: dict[str, bytes]) -> Row | Fault:
    raw = found.get("text", apart.get(key))
    try:
        text = None if raw is None else raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return Fault(key, "broken_text", str(error))
    if "picture" not in found:
        return Fault(key, "missing_picture", "its archive has a text of that name, but no picture")
    if text is None:
        return Fault(key, "missing_caption", "a picture of that name, but no text")
    return picture_row(key, found["picture"], **{column: text})


def _texts_apart(keys: list[str], known: PairOptions) -> dict[str, bytes]:
    """The texts of some keys that lie apart, from a folder, read by name, or from a tar, read through once."""
    if not known.captions:
        return {}
    path = located(known.captions)
    wanted = {f"{key.rpartition('/')[2]}.{known.text}": key for key in keys}
    if path.is_dir():
        return {key: (path / name).read_bytes() for name, key in wanted.items() if (path / name).is_file()}
    with opened(path) as files:
        named = ((one[0].rpartition("/")[2], one[1]) for one in files if not isinstance(one, Fault))
        return {wanted[base]: read() for base, read in named if base in wanted}


SOURCE = Source(PairOptions, slices, rows, paths=("files", "captions"))
