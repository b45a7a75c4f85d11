"""Lists that name images: JourneyDB (jsonl + archives), LLaVA (one JSON array), InternVL (a file of files).

Every entry of a list becomes one row or one fault; a dialogue that names no image is a row of texts alone. Its key is
the list and its number: the lists' own ids repeat. Memory holds the texts and images of one shard. Images are files, or
members of archives that are called like the first folder of the path; a list that is not sorted by archive
reads every archive once per shard, so unpack the archives then.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from unifork.errors import ConfigError
from unifork.shards.schema import CONVERSATIONS, IMAGE_MARK, Unusable, images_of, numbered, turns_of
from unifork.shards.task import Slice
from unifork.sources import (
    MAX_IMAGES,
    MAX_LINE_BYTES,
    Row,
    RowError,
    Source,
    SourceOptions,
    attempt,
    image_row,
    place_of,
    planned,
    text_row,
)
from unifork.sources.archives import open_tar, picked, until_damage
from unifork.sources.paths import as_planned, check_ending, file_named, files_of, located, opened_list, size_of
from unifork.sources.tables import bounded_lines, too_long

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
        yield from list_slices(path, shard_rows, file=name)


def list_slices(path: Path, shard_rows: int, most: int | None = None, **where: Any) -> Iterator[Slice]:
    """Slices of one list, each with the byte it starts at, so that reading it does not begin at the top."""
    check_ending(path.name, LISTS)
    start = offset = begin = stop = 0
    for stop, size in enumerate(islice(_sizes(path), most), 1):
        offset += size
        if stop - start == shard_rows:
            yield Slice(start, stop, offset=begin, bytes=size_of(path), **where)
            start, begin = stop, offset
    if start < stop:
        yield Slice(start, stop, offset=begin, bytes=size_of(path), **where)


def _sizes(path: Path) -> Iterator[int]:
    """Bytes of every entry of a list; damage is one more."""

    def sizes() -> Iterator[int]:
        with _entries(path) as entries:
            yield from (size for _, size in entries)

    return planned(sizes(), 0)


def rows(options: ListOptions, piece: Slice, _seed: int) -> Iterator[Row | RowError]:
    """The rows of one slice of a list."""
    return _rows(file_named(options.lists, piece), options, piece)


def _rows(path: Path, options: ListOptions, piece: Slice) -> Iterator[Row | RowError]:
    """Entries are read first and images then, so that an archive is opened once per shard."""
    found: list[tuple[str, Row]] = []
    damage = None
    try:
        for key, entry in objects(path, piece):
            row = entry if isinstance(entry, RowError) else attempt(key, _row, key, entry, options)
            if isinstance(row, RowError):
                yield row
            else:
                found.append((key, row))
    except Exception as error:  # raised again after the images of what came before
        damage = error
    images = dict(picked(located(options.images), [path for _, row in found for path in row["images"]]))
    numbers = count()
    for key, row in found:
        yield _with_images(key, row, [images.pop(next(numbers)) for _ in row.pop("images")])
    if damage:
        raise damage


def _with_images(key: str, row: Row, images: list[bytes | RowError]) -> Row | RowError:
    """A row with its images; the first that is not there costs the row."""
    found: list[bytes] = []
    for number, image in enumerate(images, 1):
        if isinstance(image, RowError):
            return replace(image, key=key, detail=numbered(image.detail, number, len(images)))
        found.append(image)
    return image_row(key, *found, **row) if found else text_row(key, **row)


def objects(path: Path, piece: Slice) -> Iterator[tuple[str, Row | RowError]]:
    """The entries of one slice of a list by their keys. Raises what damage raises."""
    with _entries(as_planned(path, piece), piece.offset or 0) as entries:
        for number in range(piece.start, piece.stop):
            key = f"{place_of(piece)}/{number:09d}"
            yield key, attempt(key, _parsed, key, *next(entries))


def _parsed(key: str, entry: bytes | None, size: int) -> Row | RowError:
    if entry is None:
        return RowError(key, "broken_line", too_long(size))
    text = entry.decode("utf-8-sig")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RowError(key, "broken_line", f"{error}: {text[:200]!r}")
    if not isinstance(row, dict):
        return RowError(key, "broken_line", f"an object is expected, this is {row!r:.200}")
    return row


def _row(key: str, entry: Row, options: ListOptions) -> Row | RowError:
    """The columns of an entry, `images` being the paths of its images."""
    image = entry.get(options.image)
    images = images_of({"image": image}) if isinstance(image, str | list | None) else [image]
    if not all(isinstance(path, str) for path in images):
        return RowError(key, "no_image", f"{options.image!r} is {image!r:.200}; a path or a list of paths is expected")
    if len(images) > MAX_IMAGES:
        return RowError(key, "several_images", f"{len(images)} images, at most {MAX_IMAGES} are read")
    row = texts_of(key, entry, options.texts, options.keep)
    if isinstance(row, RowError):
        return row
    turns = row.get(CONVERSATIONS)
    if not images and (not turns or any(IMAGE_MARK in turn["text"] for turn in turns)):
        return RowError(
            key, "no_image", f"{options.image!r} is {image!r}; a caption and {IMAGE_MARK} belong to an image"
        )
    "".join(images).encode()  # raises UnicodeError
    return {"images": images, **row}


def texts_of(key: str, entry: Row, texts: dict[str, str], keep: dict[str, str]) -> Row | RowError:
    """The columns that fields of an entry fill. Those of `keep` are no texts of the row."""
    try:
        row = {column: _field(entry, column, field) for column, field in texts.items()}
    except Unusable as error:
        return RowError(key, "broken_dialogue", str(error))
    if not any(row.values()):
        return RowError(key, "missing_caption", f"none of {', '.join(texts.values())} is filled")
    return row | {column: _field(entry, column, field) for column, field in keep.items()}


def _field(entry: Any, column: str, field: str) -> Any:
    """A field of a field as a text, or as turns when the column holds dialogues; None when it is not there."""
    for name in field.split("."):
        entry = entry.get(name) if isinstance(entry, dict) else None
    if entry is None or (column == CONVERSATIONS and not entry):
        return None
    if column == CONVERSATIONS:
        return turns_of({CONVERSATIONS: entry})
    return entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)


# ------------------------------------------------------------------------------------ file of files


def meta_slices(options: MetaOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards of every list of a meta file; a `repeat_time` below 1 takes the first part of a list, above 1 repeats it.

    The rule is InternVL's (internvl_chat_finetune.py): the part is taken before any shuffling.
    """
    for name, entry in _meta(options).items():
        path, repeat = Path(entry["annotation"]), entry["repeat_time"]
        most = int(sum(1 for _ in _sizes(path)) * repeat) if repeat < 1 else None
        for again in range(max(1, int(repeat))):
            yield from list_slices(path, shard_rows, most, file=name, again=again)


def meta_rows(options: MetaOptions, piece: Slice, _seed: int) -> Iterator[Row | RowError]:
    """The rows of one slice of a list that a meta file names."""
    name = piece.file or ""
    entry = _meta(options)[name]
    if AGAIN in name:
        for number in range(piece.start, piece.stop):
            yield RowError(f"{name}/{number:09d}", "duplicate_key", f"{options.meta!r} has this name already")
        return
    lists = ListOptions(lists=entry["annotation"], images=entry["root"], texts={CONVERSATIONS: "conversations"})
    yield from _rows(Path(lists.lists), lists, piece)


AGAIN = "#again"
"""After the name of a list that a meta file names a second time; the first is read."""


def _meta(options: MetaOptions) -> dict[str, dict[str, Any]]:
    """Name -> root, annotation, repeat_time of the lists of a meta file. Raises ConfigError naming file and key."""
    root, lists = Path(options.root), dict[str, dict[str, Any]]()
    try:
        # an object as its pairs, since names may repeat
        meta = json.loads(located(options.meta).read_text(encoding="utf-8-sig"), object_pairs_hook=list)
        for name, pairs in meta:
            entry = {"repeat_time": 1, **dict(pairs)}
            paths = {key: str(root / entry[key]) for key in ("root", "annotation")}
            lists[f"{name}{AGAIN}{len(lists)}" if name in lists else name] = {**entry, **paths}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ConfigError(
            f"{options.meta!r}: an object of name -> {{root, annotation, repeat_time}} is expected; "
            f"{type(error).__name__}: {error}"
        ) from None
    for name, entry in lists.items():
        place = f"{options.meta!r}: {name}"
        located(entry["root"])
        if not located(entry["annotation"]).is_file():
            raise ConfigError(f"{place}.annotation: {entry['annotation']!r} is a folder; a list is expected")
        repeat = entry["repeat_time"]
        if not isinstance(repeat, int | float) or not math.isfinite(repeat) or repeat < 0:
            raise ConfigError(f"{place}.repeat_time: {repeat!r}; a number of at least 0 is expected")
    return lists


# ----------------------------------------------------------------------------------- reading lists

Entry = tuple[bytes | None, int]
"""An entry, None for one that is too long to be read, and its size."""


@contextmanager
def _entries(path: Path, offset: int = 0) -> Iterator[Iterator[Entry]]:
    """The lines of a list, or the elements of an array, from the one on that begins at a byte.

    Both raise what damage raises, such as an archive that does not hold exactly one file.
    """
    with ExitStack() as stack:
        if path.name.endswith((".tgz", ".tar.gz")):
            with open_tar(path) as tar:  # once more below: a stream that broke off cannot be read again
                listed = [member for member in until_damage(tar) if member.isfile()]
            members = [member for member in listed if not Path(member.name).name.startswith(".")]
            if len(members) != 1:
                raise ValueError(f"{path.name}: {len(members)} files in it, one jsonl file is expected")
            file: Any = stack.enter_context(open_tar(path)).extractfile(members[0])
        else:
            file = stack.enter_context(opened_list(path, "rb"))
        file.seek(offset)
        if path.suffix == ".json":
            yield _elements(file, offset)
        else:
            yield ((line if size == len(line) else None, size) for line, size in bounded_lines(file, b"\n"))


ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
"""A string, the beginning of one that goes on in the next block, or what opens, closes and separates elements."""
REST = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
"""The end of a string that began in an earlier block."""


def _blocks(file: Any) -> Iterator[bytes]:
    """A file in pieces, none of which ends within an escape."""
    while block := file.read(1 << 18):
        while (len(block) - len(block.rstrip(b"\\"))) % 2 and (more := file.read(1)):
            block += more
        yield block


def _elements(file: Any, offset: int) -> Iterator[Entry]:
    """The elements of a JSON array as they are written; their sizes include the mark before them, `[` or `,`.

    An element is what lies between two commas outside of all brackets and strings: what is wrong in one of them is
    found by who parses it, and costs no other. Memory holds one element. Raises ValueError where there is no array or
    more than one, EOFError where it does not end.
    """
    element, size, depth, inside, first = bytearray(), 0, 0, False, offset == 0
    for block in _blocks(file):
        begin = place = 0
        if depth == 0:
            opening = ARRAY.match(block) if first else re.match(b",", block)
            if not opening:
                raise ValueError(f"a JSON array is expected, it starts with {block[:40]!r}")
            depth, size, begin = 1, opening.end(), opening.end()
            place = begin
        if inside and (rest := REST.match(block)):
            inside, place = False, rest.end()
        while not inside and (token := TOKEN.search(block, place)):
            mark, place = token[0], token.end()
            inside = mark == b'"'
            depth += (mark in (b"[", b"{")) - (mark == b"]" or (mark == b"}" and depth > 1))
            if depth == 0 or (depth == 1 and mark == b","):
                element += block[begin : token.start()][: MAX_LINE_BYTES + 1 - len(element)]
                size += token.start() - begin
                if not (first and depth == 0 and not element.strip()):  # an array of nothing
                    yield (bytes(element) if len(element) <= MAX_LINE_BYTES else None), size
                if depth == 0:
                    if (block[place:] + file.read(4096)).strip():
                        raise ValueError("it goes on after the end of the array")
                    return
                element, size, begin, first = bytearray(), 1, place, False
        element += block[begin:][: MAX_LINE_BYTES + 1 - len(element)]
        size += len(block) - begin
    if depth == 1 and not inside and element.strip():
        yield bytes(element), size
    raise EOFError("the array does not end")


SOURCE = Source(ListOptions, slices, rows, paths=("lists", "images"), version=1)
META_SOURCE = Source(MetaOptions, meta_slices, meta_rows, paths=("meta", "root"), version=1)
