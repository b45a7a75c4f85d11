"""ImageNet-1K in its three forms, each picture with its class in one of OpenAI's sentences.

The official tar of one tar per class (or these tars in a folder), a folder per class, or the Parquet of
`ILSVRC/imagenet-1k` on the Hub. Class i is the i-th synset in sorted order, as in torchvision and in the
official code. The sentence is chosen by (seed, key). Pictures stay as received: some are CMYK, one is a
PNG that is called JPEG.

Names and sentences are read from `zero_shot_metadata.py`, which open_clip (PyPI open_clip_torch, MIT) and
the official repository (configs/) carry with equal contents: 1000 names, 80 sentences. The file is parsed,
never run.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from unifork.config import Plain, parse
from unifork.errors import ConfigError
from unifork.randomness import keyed
from unifork.sources.archives import BROKEN, opened, pictures_in
from unifork.sources.base import (
    Fault,
    Options,
    Row,
    Slice,
    Task,
    as_planned,
    cut,
    located,
    picture_row,
    without_suffix,
)


class ImageNetOptions(Plain):
    """What a card says of the set."""

    path: str
    """The official tar, a folder of tars or folders named by synset, or a folder of Parquet files."""
    prompts: str
    """The file `zero_shot_metadata.py`."""
    synsets: str | None = None
    """`LOC_synset_mapping.txt` (a synset and its names per line): the order of the classes of a part of the set."""


@dataclass(frozen=True)
class Sentences:
    """Class names by label, and sentences with `{}` for a name."""

    names: tuple[str, ...]
    templates: tuple[str, ...]

    def texts(self, label: int, seed: int, key: str) -> dict[str, str]:
        """The text columns of a picture."""
        template = self.templates[int(keyed(seed, "class_prompt", key).integers(len(self.templates)))]
        return {"class_name": self.names[label], "class_prompt": template.format(self.names[label])}


@lru_cache(maxsize=4)
def sentences(text: str) -> Sentences:
    """Class names and sentences of a `zero_shot_metadata.py`. Raises ConfigError when they are not found."""
    try:
        tree = ast.parse(located(text).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ConfigError(f"{text!r}: not a Python file: {error}") from None
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    try:
        names = tuple(ast.literal_eval(values["IMAGENET_CLASSNAMES"]))
        listed = values["OPENAI_IMAGENET_TEMPLATES"]
        templates = tuple(_template(one) for one in listed.elts)  # type: ignore[attr-defined]
    except (KeyError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{text!r}: IMAGENET_CLASSNAMES and OPENAI_IMAGENET_TEMPLATES are expected as in open_clip's "
            f"zero_shot_metadata.py; {type(error).__name__}: {error}"
        ) from None
    return Sentences(names, templates)


def _template(node: Any) -> str:
    """`lambda c: f'a photo of a {c}.'` as `a photo of a {}.`"""
    return "".join(
        str(part.value).replace("{", "{{").replace("}", "}}") if isinstance(part, ast.Constant) else "{}"
        for part in node.body.values
    )


# ---------------------------------------------------------------------------------------- planning


def slices(options: Options, shard_rows: int) -> Iterator[Slice]:
    """Shards of every class, or of every Parquet file."""
    known = parse(ImageNetOptions, options, "source.options")
    names = sentences(known.prompts).names
    path = located(known.path)
    tables = sorted(path.glob("*.parquet")) if path.is_dir() else []
    for table in tables:
        count = pq.read_metadata(table).num_rows
        yield from cut(count, shard_rows, file=table.name, bytes=table.stat().st_size)
    if tables:
        return
    labels = _labels(known, _classes(path), len(names))
    for synset, where in _classes(path).items():
        with opened(path / where["file"], where.get("inner")) as box:
            count = len(pictures_in(box, synset))
        yield from cut(count, shard_rows, label=labels[synset], **where)


def _classes(path: Path) -> dict[str, dict[str, Any]]:
    """Synset -> where its pictures are, in sorted order."""
    if path.is_file():
        size = path.stat().st_size
        with opened(path) as box:
            inner = sorted(name for name in box.names if name.endswith(".tar"))
        return {without_suffix(Path(name).name): {"file": "", "inner": name, "bytes": size} for name in inner}
    tars = {without_suffix(tar.name): {"file": tar.name, "bytes": tar.stat().st_size} for tar in path.glob("*.tar")}
    folders = {one.name: {"file": one.name, "bytes": 0} for one in path.iterdir() if one.is_dir()}
    return dict(sorted((tars or folders).items()))


def _labels(known: ImageNetOptions, classes: dict[str, Any], names: int) -> dict[str, int]:
    """Synset -> label. Raises ConfigError when the classes cannot be numbered."""
    if known.synsets:
        lines = located(known.synsets).read_text(encoding="utf-8").splitlines()
        order = [line.split()[0] for line in lines if line.strip()]
    else:
        order = list(classes)
    if len(order) != names or not set(classes) <= set(order):
        raise ConfigError(
            f"{known.synsets or known.path!r}: {len(order)} classes, but {names} class names in {known.prompts!r}. "
            f"A part of ImageNet needs source.options.synsets, the list of all its classes in order"
        )
    return {synset: label for label, synset in enumerate(order)}


# ----------------------------------------------------------------------------------------- reading


def rows(task: Task) -> Iterator[Row | Fault]:
    """The pictures of one slice with `class_name` and `class_prompt`."""
    known = parse(ImageNetOptions, task["options"], "source.options")
    told, path = sentences(known.prompts), as_planned(located(known.path) / task["file"], task)
    if "label" not in task:
        yield from _table_rows(path, task, told)
        return
    with opened(path, task.get("inner")) as box:
        place = without_suffix(Path(task.get("inner") or task["file"]).name)
        for one in pictures_in(box, place)[task["start"] : task["stop"]]:
            if isinstance(one, Fault):
                yield one
                continue
            key = f"{place}/{without_suffix(one[0])}"
            try:
                image = box.read(one[1])
            except BROKEN as error:
                yield Fault(key, "broken_archive", f"{type(error).__name__}: {error}")
                continue
            yield picture_row(key, image, **told.texts(task["label"], task["seed"], key))


def _table_rows(path: Path, task: Task, told: Sentences) -> Iterator[Row | Fault]:
    file, first = pq.ParquetFile(path), 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        begin, end = max(task["start"] - first, 0), min(task["stop"] - first, count)
        if begin < end:
            chunk = file.read_row_group(group, columns=["image", "label"]).slice(begin, end - begin)
            for number, row in enumerate(chunk.to_pylist(), first + begin):
                yield _table_row(f"{without_suffix(path.name)}/{number:07d}", row, task["seed"], told)
        first += count


def _table_row(key: str, row: Row, seed: int, told: Sentences) -> Row | Fault:
    image = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
    label = row["label"]
    if not image:
        return Fault(key, "missing_picture", "the row has no bytes of a picture")
    if label is None or not 0 <= int(label) < len(told.names):
        return Fault(key, "no_label", f"label {label} is none of 0 to {len(told.names) - 1}", image)
    return picture_row(key, image, **told.texts(int(label), seed, key))
