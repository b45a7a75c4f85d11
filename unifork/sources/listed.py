"""Lists that name images: JourneyDB (jsonl + archives), LLaVA (one JSON array), InternVL (a file of files).

Every entry of a list becomes one row or one fault, in the order of the list. Its key is the list and its
number: the lists' own ids repeat. Memory holds the texts and images of one shard. Images are files, or
members of archives that are called like the first folder of the path; a list that is not sorted by archive
reads every archive once per shard, so unpack the archives then.
"""

import json
import tarfile
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import ijson

from unifork.errors import ConfigError, DataError
from unifork.shards.schema import CONVERSATIONS, Unusable, images_of, turns_of
from unifork.shards.task import Slice
from unifork.sources import (
    Row,
    RowError,
    Source,
    SourceOptions,
    as_planned,
    check_ending,
    file_named,
    files_of,
    image_row,
    located,
    opened_list,
    without_suffix,
)
from unifork.sources.archives import picked

LISTS = (".jsonl", ".jsonl.gz", ".jsonl.tgz", ".jsonl.tar.gz", ".json")


class ListOptions(SourceOptions):
    """What a card says of such a set."""

    lists: str
    """jsonl files (also .gz, or alone in a .tgz) or JSON arrays; a file, a folder or a glob."""
    images: str
    """Folder that the paths of the images start in."""
    image: str = "image"
    """Field with the path of the image."""
    texts: dict[str, str]
    """Column -> field that fills it; `Task2.Caption` is a field of a field. Dialogues are translated."""
    keep: dict[str, str] = {}
    """The same for columns that are no text of the row, such as the path of its image."""


class MetaOptions(SourceOptions):
    """A file of files, as InternVL trains on: name -> root, annotation, repeat_time, length."""

    meta: str
    """The JSON file; its paths are relative to `root` below, unless they are absolute."""
    root: str = "."
    """Folder that the paths in the file start in."""


# ------------------------------------------------------------------------------------------- lists


def slices(options: ListOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards of every list."""
    located(options.images)
    for name, path in files_of(options.lists, LISTS):
        yield from _slices(path, shard_rows, None, file=name)


def _slices(path: Path, shard_rows: int, most: int | None, **where: Any) -> Iterator[Slice]:
    """Slices of one list, each with the byte it starts at, so that reading it does not begin at the top."""
    check_ending(path.name, LISTS)
    where["bytes"] = path.stat().st_size
    start, offset = 0, None if path.suffix == ".json" else 0
    with _entries(path) as entries:
        while block := list(islice(entries, shard_rows if most is None else min(shard_rows, most - start))):
            yield Slice(start, start + len(block), offset=offset, **where)
            start += len(block)
            offset = None if offset is None else offset + sum(map(len, block))


def rows(options: ListOptions, piece: Slice, _seed: int) -> Iterator[Row | RowError]:
    """The rows of one slice of a list."""
    return _rows(file_named(options.lists, piece), without_suffix(piece.file or ""), options, piece)


def _rows(path: Path, place: str, options: ListOptions, piece: Slice) -> Iterator[Row | RowError]:
    """Entries are read first and images then, so that an archive is opened once per shard."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    with _entries(as_planned(path, piece), piece.start, piece.offset or 0) as entries:
        for number, entry in enumerate(islice(entries, piece.rows), piece.start):
            key = f"{place}/{number:09d}"
            try:
                parsed = json.loads(entry) if isinstance(entry, bytes) else entry
            except ValueError as error:  # also bytes that are not UTF-8
                yield RowError(key, "broken_line", f"{error}: {cast(bytes, entry)[:200]!r}")
                continue
            row = _texts(key, parsed, options)
            if isinstance(row, RowError):
                yield row
            else:
                found.append((key, *row))
    for index, image in picked(located(options.images), [path for _, path, _ in found]):
        key, _, columns = found[index]
        yield replace(image, key=key) if isinstance(image, RowError) else image_row(key, image, **columns)


def _texts(key: str, entry: Any, options: ListOptions) -> tuple[str, dict[str, Any]] | RowError:
    """The path of an entry's image, and its columns."""
    if not isinstance(entry, dict):
        return RowError(key, "broken_line", f"an object is expected, this is {entry!r:.200}")
    image = entry.get(options.image)
    images = images_of({"image": image}) if isinstance(image, (str, list)) else []
    if len(images) != 1 or not isinstance(images[0], str):
        reason = "several_images" if len(images) > 1 else "no_image"
        return RowError(key, reason, f"{options.image!r} is {image!r:.200}; a row has one image")
    try:
        texts = {column: _field(entry, column, field) for column, field in options.texts.items()}
    except Unusable as error:
        return RowError(key, "broken_dialogue", str(error))
    if not any(texts.values()):
        return RowError(key, "missing_caption", f"none of {', '.join(options.texts.values())} is filled")
    return images[0], {**texts, **{column: _field(entry, column, field) for column, field in options.keep.items()}}


def _field(entry: Any, column: str, field: str) -> Any:
    """A field of a field as a text, or as turns when the column holds dialogues; None when it is not there."""
    for name in field.split("."):
        entry = entry.get(name) if isinstance(entry, dict) else None
    if entry is None or (column == CONVERSATIONS and not entry):
        return None
    if column == CONVERSATIONS:
        return turns_of({CONVERSATIONS: entry})
    return entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False, default=float)


# ------------------------------------------------------------------------------------ file of files


def meta_slices(options: MetaOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards of every list of a meta file; a `repeat_time` below 1 takes the first part of a list, above 1 repeats it.

    The rule is InternVL's (internvl_chat_finetune.py): the part is taken before any shuffling.
    """
    for name, entry in _meta(options).items():
        path, repeat = located(str(entry["annotation"])), float(entry.get("repeat_time", 1))
        most = None
        if repeat < 1:
            with _entries(path) as entries:
                most = int(sum(1 for _ in entries) * repeat)
        for again in range(max(1, int(repeat))):
            yield from _slices(path, shard_rows, most, file=name, again=again)


def meta_rows(options: MetaOptions, piece: Slice, _seed: int) -> Iterator[Row | RowError]:
    """The rows of one slice of a list that a meta file names."""
    name = piece.file or ""
    entry = _meta(options)[name]
    lists = ListOptions(lists=entry["annotation"], images=entry["root"], texts={CONVERSATIONS: "conversations"})
    return _rows(located(lists.lists), f"{name}~{piece.again}" if piece.again else name, lists, piece)


def _meta(options: MetaOptions) -> dict[str, dict[str, Any]]:
    try:
        meta = json.loads(located(options.meta).read_text(encoding="utf-8"))
        root = Path(options.root)
        return {
            name: {**entry, "root": str(root / entry["root"]), "annotation": str(root / entry["annotation"])}
            for name, entry in meta.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{options.meta!r}: an object of name -> {{root, annotation, repeat_time}} is expected; "
            f"{type(error).__name__}: {error}"
        ) from None


# ----------------------------------------------------------------------------------- reading lists


@contextmanager
def _entries(path: Path, start: int = 0, offset: int = 0) -> Iterator[Iterator[Any]]:
    """The lines of a list as bytes, or the objects of an array, from number `start` on.

    offset: the byte at which that line begins. Raises DataError when an archive does not hold exactly one file.
    """
    if path.suffix == ".json":
        yield islice(_array(path), start, None)
        return
    with ExitStack() as stack:
        if path.name.endswith((".tgz", ".tar.gz")):
            tar = stack.enter_context(tarfile.open(path))
            members = [member for member in tar if member.isfile() and not Path(member.name).name.startswith(".")]
            file = tar.extractfile(members[0]) if len(members) == 1 else None
            if file is None:
                raise DataError(f"{path}: {len(members)} files in it, one jsonl file is expected")
        else:
            file = stack.enter_context(opened_list(path, "rb"))
        file.seek(offset)
        yield iter(file)


def _array(path: Path) -> Iterator[Any]:
    """The elements of a JSON array one by one, in little memory. Raises DataError where it breaks."""
    with open(path, "rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        begin = file.tell()
        head = file.read(4096).lstrip()
        if not head.startswith(b"["):
            raise DataError(f"{path}: a JSON array is expected, it starts with {head[:40]!r}")
        file.seek(begin)
        try:
            yield from ijson.items(file, "item")
        except (ijson.JSONError, ValueError) as error:  # the latter: bytes that are not UTF-8
            raise DataError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from None


SOURCE = Source(ListOptions, slices, rows, paths=("lists", "images"))
META_SOURCE = Source(MetaOptions, meta_slices, meta_rows, paths=("meta", "root"))
