"""Images with a text of the same name: WebDataset tars (BLIP3o-60k), SA-1B tars or folders with captions apart.

A sample is every member whose name agrees up to its ending, or else up to the first dot of its last part, wherever in
the archive they lie. Its key is the archive and that name.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path

from unifork.errors import ConfigError, Rejected, rejected
from unifork.shards.task import Slice
from unifork.sources import MAX_TEXT_BYTES, Row, RowError, Source, SourceOptions, cut, image_row, located
from unifork.sources.archives import ARCHIVES, Contents, File, is_image, opened, read_below, rows_in, samples_in
from unifork.sources.files import as_planned, check_ending, file_named, files_of, hidden, size_of


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
        found = [(entry.name, entry) for entry in sorted(root.iterdir()) if not hidden(entry.name)]
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
        with _opened(path, name) as files:
            count = len(samples_in(files, name, _ending(options)))
        yield from cut(count, shard_rows, file=name, bytes=size_of(path))


def rows(options: PairOptions, piece: Slice, _seed: int) -> Iterator[Row | RowError]:
    """The samples of one slice."""
    with _opened(as_planned(file_named(options.files, piece), piece), piece.file or "") as files:
        chosen = samples_in(files, piece.file or "", _ending(options))[piece.start : piece.stop]
        apart = _texts_apart([sample[0] for sample in chosen if not isinstance(sample, RowError)], options)
        yield from rows_in(chosen, partial(_row, options=options, apart=apart))


def _opened(path: Path, name: str) -> AbstractContextManager[Iterator[File | Rejected]]:
    link = Rejected("not_a_file", f"{name!r} is a link to a folder, which is not followed")
    return nullcontext(iter([link])) if name != "." and path.is_dir() and path.is_symlink() else opened(path)


def _ending(options: PairOptions) -> str | None:
    """That of the texts beside the images; None when they lie apart."""
    return None if options.captions else options.text


def _row(key: str, found: Contents, options: PairOptions, apart: dict[str, bytes | Rejected]) -> Row:
    text = found.get("text", apart.get(key))
    if isinstance(text, Rejected):
        raise Rejected(text.reason, str(text))
    caption = None if text is None else text.decode("utf-8-sig").strip()
    if "image" not in found:
        raise Rejected("missing_image", "its archive has a text of that name, but no image")
    if caption is None:
        raise Rejected("missing_caption", f"an image of that name, but no .{options.text}")
    return image_row(key, found["image"], **{options.column: caption})


def _texts_apart(keys: list[str], options: PairOptions) -> dict[str, bytes | Rejected]:
    """The texts of some keys that lie apart, from a folder, read by name, or from a tar, read through once."""
    if not options.captions:
        return {}
    path, texts = located(options.captions), dict[str, bytes | Rejected]()
    wanted = {f"{key.rpartition('/')[2]}.{options.text}": key for key in keys}
    with ExitStack() as stack:
        if path.is_dir():
            root = path.resolve()
            files: Iterable[File | Rejected] = ((name, partial(read_below, root, name)) for name in wanted)
        else:
            files = stack.enter_context(opened(path))
        for file in files:
            if isinstance(file, Rejected):
                why = Rejected("missing_caption", f"{path.name}: {file}")
                texts |= {key: why for key in wanted.values() if key not in texts}
            elif key := wanted.get(file[0].rpartition("/")[2]):
                try:
                    texts[key] = file[1](MAX_TEXT_BYTES)
                except FileNotFoundError:  # an image without a caption
                    continue
                except Exception as error:
                    texts[key] = rejected(error, "missing_caption")
    return texts


SOURCE = Source(PairOptions, slices, rows, paths=("files", "captions"), version=1)
