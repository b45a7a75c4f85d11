"""Images with a text of the same name: WebDataset tars (BLIP3o-60k), SA-1B tars or folders with captions apart.

A sample is every member whose name agrees up to the first dot of its last part, wherever in the archive
they lie. Its key is the archive and that name.
"""

from collections.abc import Iterator
from pathlib import Path

from unifork.errors import ConfigError
from unifork.shards.task import Slice
from unifork.sources import (
    Row,
    RowError,
    Source,
    SourceOptions,
    as_planned,
    check_ending,
    cut,
    file_named,
    files_of,
    image_row,
    located,
)
from unifork.sources.archives import ARCHIVES, contents, is_image, opened, samples_in


class PairOptions(SourceOptions):
    """What a card says of such a set."""

    files: str
    """Tars (globs are allowed), or a folder of tars, of folders, or of the images themselves."""
    text: str = "txt"
    """Ending of the members that are texts."""
    captions: str | None = None
    """Where the texts are when they lie apart: a folder or tar of `<name of the image>.<text>`."""
    column: str = "caption"
    """Text column that they become."""


def _containers(files: str) -> list[tuple[str, Path]]:
    """(name, path) of every tar; without tars of every folder, or of the one folder that holds the images itself."""
    try:
        found = files_of(files, ARCHIVES)
    except ConfigError:
        root = located(files)
        found = [(entry.name, entry) for entry in sorted(root.iterdir())]
        if any(is_image(name) for name, _ in found):
            return [(".", root)]
        found = [(name, path) for name, path in found if path.is_dir()] or found
    for name, path in found:
        if path.is_file():
            check_ending(name, ARCHIVES)
    return found


def slices(options: PairOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards of every archive, in the order of their names."""
    if options.captions:
        located(options.captions)
    for name, path in _containers(options.files):
        with opened(path) as files:
            count = len(samples_in(files, name, _ending(options)))
        yield from cut(count, shard_rows, file=name, bytes=0 if path.is_dir() else path.stat().st_size)


def rows(options: PairOptions, piece: Slice, _seed: int) -> Iterator[Row | RowError]:
    """The samples of one slice."""
    with opened(as_planned(file_named(options.files, piece), piece)) as files:
        chosen = samples_in(files, piece.file or "", _ending(options))[piece.start : piece.stop]
        apart = _texts_apart([sample[0] for sample in chosen if not isinstance(sample, RowError)], options)
        for sample in contents(chosen):
            yield sample if isinstance(sample, RowError) else _row(*sample, options.column, apart)


def _ending(options: PairOptions) -> str | None:
    """That of the texts beside the images; None when they lie apart."""
    return None if options.captions else options.text


def _row(key: str, found: dict[str, bytes], column: str, apart: dict[str, bytes]) -> Row | RowError:
    raw = found.get("text", apart.get(key))
    try:
        text = None if raw is None else raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return RowError(key, "broken_text", str(error))
    if "image" not in found:
        return RowError(key, "missing_image", "its archive has a text of that name, but no image")
    if text is None:
        return RowError(key, "missing_caption", "an image of that name, but no text")
    return image_row(key, found["image"], **{column: text})


def _texts_apart(keys: list[str], options: PairOptions) -> dict[str, bytes]:
    """The texts of some keys that lie apart, from a folder, read by name, or from a tar, read through once."""
    if not options.captions:
        return {}
    path = located(options.captions)
    wanted = {f"{key.rpartition('/')[2]}.{options.text}": key for key in keys}
    if path.is_dir():
        return {key: (path / name).read_bytes() for name, key in wanted.items() if (path / name).is_file()}
    with opened(path) as files:
        named = ((file[0].rpartition("/")[2], file[1]) for file in files if not isinstance(file, RowError))
        return {wanted[base]: read() for base, read in named if base in wanted}


SOURCE = Source(PairOptions, slices, rows, paths=("files", "captions"))
