"""Tables and lists: Parquet, CSV, TSV, jsonl, JSON. An image is bytes, a struct of the Hub, a path or a URL.

Sets from the Hub, a CSV beside a folder of images, JourneyDB (jsonl + archives), LLaVA (JSON array), InternVL (a file
of files), and corpora of texts alone. Every entry becomes one row or one error; a dialogue that names no image is a row
of texts alone. Its key is the file and its number, or what a column says. Memory holds the texts and images of one
shard. Images are files, or members of archives that are called like the first folder of the path; a list that is not
sorted by archive reads every archive once per shard, so unpack the archives then.
"""

import json
import math
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from unifork.errors import ConfigError, Rejected, one_of
from unifork.shards.schema import CONVERSATIONS, IMAGE_MARK, numbered, turns_of
from unifork.shards.task import Slice
from unifork.sources import (
    MAX_IMAGES,
    Row,
    RowError,
    Source,
    SourceOptions,
    attempt,
    cut,
    image_row,
    located,
    names_of,
    oversize,
    row_of,
    text_row,
)
from unifork.sources.archives import picked
from unifork.sources.files import (
    TABLES,
    Check,
    as_planned,
    check_ending,
    file_named,
    files_of,
    size_of,
    table_count,
    table_rows,
    table_sha256,
)
from unifork.sources.list_files import LISTS, list_slices, objects, sizes_of
from unifork.sources.url_lists import FetchRules, text_or_none


class TableOptions(SourceOptions):
    """What a card says of such a set."""

    files: str
    """Parquet, CSV, TSV (also .gz), jsonl (also .gz, or alone in a .tgz) or JSON arrays; a file, a folder or a glob."""
    image: str | None = "image"
    """Column with bytes, a struct of the Hub (`bytes`, `path`), a path or a list of them; null: texts alone."""
    root: str | None = None
    """Folder that paths start in; without it, that of the file. DVC follows it only where it is named."""
    texts: dict[str, str]
    """Column -> field that fills it; `Task2.Caption` is a field of a field, `captions.0` the first of a list. Dialogues
    are translated."""
    keep: dict[str, str] = {}
    """The same for columns that are no text of the row, such as the path of its image."""
    key: str | None = None
    """Field that differs in every row and names it; otherwise rows are called by file and number."""
    fetch: FetchRules | None = None
    """How the images are fetched where `image` is a column of URLs; `{}` for the usual rules."""

    @property
    def web(self) -> bool:
        return self.fetch is not None

    @property
    def text_only(self) -> bool:
        return self.image is None

    def read(self, name: str, columns: list[str]) -> list[str]:
        """Those of a table's columns that are read. Raises ConfigError where one that is named is not there."""
        named = filter(None, (self.image, self.key, *self.texts.values(), *self.keep.values()))
        fields = {field if field in columns else field.split(".")[0] for field in named}
        return [one_of("column", field, columns, name) for field in sorted(fields)]


class MetaOptions(SourceOptions):
    """A file of files, as InternVL trains on: name -> root, annotation, repeat_time, length."""

    meta: str
    """The JSON file; its paths are relative to `root` below, unless they are absolute."""
    root: str = "."
    """Folder that the paths in the file start in."""


# -------------------------------------------------------------------------------------------- rows


def slices(options: TableOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards of every file. Raises ConfigError for a table without a column that is named."""
    if options.root:
        located(options.root)
    for name, path in files_of(options.files, (*TABLES, *LISTS)):
        yield from _slices(name, path, shard_rows, partial(options.read, name))


def _slices(name: str, path: Path, shard_rows: int, check: Check) -> Iterator[Slice]:
    check_ending(name, (*TABLES, *LISTS))
    content = table_sha256(path)  # a text may change and not its length
    if name.lower().endswith(LISTS):
        return list_slices(path, shard_rows, file=name, content=content)
    return cut(table_count(path, check), shard_rows, file=name, bytes=size_of(path), content=content)


def rows(options: TableOptions, piece: Slice, _seed: int) -> Iterator[Row | RowError]:
    """The rows of one slice of a file."""
    return _rows(file_named(options.files, piece), options, piece)


def _rows(path: Path, options: TableOptions, piece: Slice) -> Iterator[Row | RowError]:
    """Entries are read first and files then, so that an archive is opened once per shard."""
    found: list[Row] = []
    damage = None
    try:
        for key, entry in zip(names_of(piece), _entries(path, piece, options), strict=False):
            row = row_of(key, entry, partial(_row, options=options))
            if isinstance(row, RowError):
                yield row
            else:
                found.append(row)
    except Exception as error:  # raised again after the images of what came before
        damage = error
    paths = [image for row in found for image in row["images"] if isinstance(image, str)]
    files = dict(picked(located(options.root) if options.root else path.parent, paths)) if not options.web else {}
    numbers = count()
    for row in found:
        if options.web:
            (url,) = row.pop("images")
            yield {**text_row(**row), "url": url}
        else:
            images = [files.pop(next(numbers)) if isinstance(image, str) else image for image in row.pop("images")]
            yield attempt(row["key"], _with_images, row, images)
    if damage:
        raise damage


def _with_images(row: Row, images: list[bytes | Rejected]) -> Row:
    """A row with its images. Raises Rejected for the first that is not there or too large."""
    for number, image in enumerate(images, 1):
        if problem := image if isinstance(image, Rejected) else oversize(len(image)):
            raise Rejected(problem.reason, numbered(str(problem), number, len(images)))
    found = [image for image in images if isinstance(image, bytes)]
    return image_row(row.pop("key"), *found, **row) if found else text_row(**row)


def _entries(path: Path, piece: Slice, options: TableOptions | None) -> Iterator[Row | Rejected]:
    """The entries of a slice, with the columns that options name, or all. Raises what damage raises."""
    if path.name.lower().endswith(LISTS):
        return objects(path, piece)
    return table_rows(as_planned(path, piece), piece, partial(options.read, path.name) if options else list)


def first_entries(name: str, path: Path, most: int) -> list[Row]:
    """The first entries of a file with all their columns, as they stand there; broken ones are left out.

    Raises ValueError where all are broken, with what is wrong with the first.
    """
    piece = next(_slices(name, path, most, len), Slice(0, 0, file=name, bytes=size_of(path)))
    found = list(_entries(path, piece, None))
    broken = [entry for entry in found if isinstance(entry, Rejected)]
    if broken and len(broken) == len(found):
        raise ValueError(f"{broken[0].reason}: {broken[0]}")
    return [entry for entry in found if not isinstance(entry, Rejected)]


def _row(key: str, entry: Row, options: TableOptions) -> Row:
    """The columns of an entry, `images` being the bytes or the paths of its images, or its URL. Raises Rejected."""
    images = _images(entry, options)
    row = _texts(entry, options)
    turns = row.get(CONVERSATIONS)
    if options.image and not images and (not turns or any(IMAGE_MARK in turn["text"] for turn in turns)):
        raise Rejected("no_image", f"{options.image!r} is empty; a caption and {IMAGE_MARK} belong to an image")
    "".join(path for path in images if isinstance(path, str)).encode()  # raises UnicodeError
    name = text_or_none(_at(entry, options.key)) if options.key else key
    if not name:
        raise Rejected("no_key", f"{options.key!r} is empty")
    return {"key": name, "images": images, **row}


def _images(entry: Row, options: TableOptions) -> list[bytes | str]:
    """What an entry says of its images. Raises Rejected."""
    value = _at(entry, options.image) if options.image else None
    found = [_image(image) for image in (value if isinstance(value, list) else [value] if value else [])]
    images = [image for image in found if image]
    paths = [image for image in images if isinstance(image, str)]
    what = f"{options.image!r} is {value!r:.200}"
    if len(images) < len(found):
        raise Rejected("no_image", f"{what}; bytes, a path or a list of them is expected")
    if len(images) > MAX_IMAGES:
        raise Rejected("several_images", f"{len(images)} images, at most {MAX_IMAGES} are read")
    if options.web and not len(images) == len(paths) == 1:
        raise Rejected("no_url", f"{what}; a URL is expected")
    if not options.web and any("://" in path for path in paths):
        raise Rejected("no_image", f"{what}, a URL; with fetch: {{}} in source.options it is fetched")
    return images


def _image(value: Any) -> bytes | str | None:
    """Bytes or path of an image; None for anything else."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes | str) else None


def _at(entry: Any, field: str) -> Any:
    """A field, a field of a field, or an element of a list; None where it is not there, or not a number."""
    for name in [field] if field in entry else field.split("."):
        if isinstance(entry, list) and name.isdecimal():
            entry = dict(enumerate(entry)).get(int(name))
        else:
            entry = entry.get(name) if isinstance(entry, dict) else None
    return None if isinstance(entry, float) and math.isnan(entry) else entry


def _texts(entry: Row, options: TableOptions) -> Row:
    """The columns that fields of an entry fill. Those of `keep` are no texts of the row. Raises Rejected."""
    row = {column: _text(entry, column, field) for column, field in options.texts.items()}
    if not any(row.values()):
        raise Rejected("missing_caption", f"none of {', '.join(options.texts.values())} is filled")
    return row | {column: _written(_at(entry, field)) for column, field in options.keep.items()}


def _text(entry: Any, column: str, field: str) -> Any:
    """A field as a text, or as turns when the column holds dialogues; None when it is not there or blank.

    Raises Rejected for what is no text.
    """
    value = _at(entry, field)
    if column == CONVERSATIONS:
        return turns_of({CONVERSATIONS: value}) if value else None
    if isinstance(value, list | dict):
        raise Rejected("broken_text", f"{field!r} is {value!r:.200}; a text is expected (`{field}.0`: first of a list)")
    text = _written(value)
    return text if text and text.strip() else None


def _written(value: Any) -> str | None:
    """A value of any kind as a text."""
    if isinstance(value, bytes):
        value = value.decode()
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# ------------------------------------------------------------------------------------ file of files


def meta_slices(options: MetaOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards of every list of a meta file; a `repeat_time` below 1 takes the first part of a list, above 1 repeats it.

    The rule is InternVL's (internvl_chat_finetune.py): the part is taken before any shuffling.
    """
    for name, entry in _meta(options).items():
        path, repeat = Path(entry["annotation"]), entry["repeat_time"]
        most = int(sum(1 for _ in sizes_of(path)) * repeat) if repeat < 1 else None
        for again in range(max(1, int(repeat))):
            yield from list_slices(path, shard_rows, most, file=name, again=again)


def meta_rows(options: MetaOptions, piece: Slice, _seed: int) -> Iterator[Row | RowError]:
    """The rows of one slice of a list that a meta file names."""
    name = piece.file or ""
    entry = _meta(options)[name]
    if AGAIN in name:
        for key in names_of(piece):
            yield RowError(key, "duplicate_key", f"{options.meta!r} has this name already")
        return
    lists = TableOptions(files=entry["annotation"], root=entry["root"], texts={CONVERSATIONS: "conversations"})
    yield from _rows(Path(lists.files), lists, piece)


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


SOURCE = Source(TableOptions, slices, rows, paths=("files", "root"), version=2)
META_SOURCE = Source(MetaOptions, meta_slices, meta_rows, paths=("meta", "root"), version=2)
