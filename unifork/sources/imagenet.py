"""ImageNet-1K in its three forms, each image with its class in one of OpenAI's sentences.

The official tar of one tar per class (or these tars in a folder), a folder per class, or the Parquet of
`ILSVRC/imagenet-1k` on the Hub. Class i is the i-th synset in sorted order, as in torchvision and in the
official code. The sentence is chosen by (seed, key). Images stay as received: some are CMYK, one is a
PNG that is called JPEG.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from unifork.config import StrictModel, load
from unifork.errors import ConfigError, Rejected
from unifork.randomness import keyed
from unifork.shards.task import Slice
from unifork.sources import (
    Row,
    RowError,
    Source,
    SourceOptions,
    cut,
    image_row,
    located,
    named,
    oversize,
    row_of,
    without_kind,
)
from unifork.sources.archives import Contents, File, opened, rows_in, samples_in
from unifork.sources.files import as_planned, parquet_count, parquet_rows, size_of


class ImageNetOptions(SourceOptions):
    """What a card says of the set."""

    path: str
    """The official tar, a folder of tars or folders named by synset, or a folder of Parquet files."""
    prompts: str | None = None
    """A YAML file of `names` and `templates` in the place of `imagenet_prompts.yaml` beside this module."""
    synsets: str | None = None
    """`LOC_synset_mapping.txt` (a synset and its names per line): the order of the classes of a part of the set."""


class Sentences(StrictModel):
    """Class names by label, and sentences with `{}` for a name."""

    names: tuple[str, ...]
    templates: Annotated[tuple[Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")], ...], Field(min_length=1)]

    def texts(self, label: int, seed: int, key: str) -> dict[str, str]:
        """The text columns of an image."""
        template = self.templates[int(keyed(seed, "class_prompt", key).integers(len(self.templates)))]
        return {"class_name": self.names[label], "class_prompt": template.format(self.names[label])}


def sentences(text: str | None) -> Sentences:
    """Class names and sentences of a file, or those of OpenAI. Raises ConfigError."""
    return load(Sentences, located(text) if text else Path(__file__).with_name("imagenet_prompts.yaml"))


# ---------------------------------------------------------------------------------------- planning


def slices(options: ImageNetOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards of every class, or of every Parquet file. Other sentences make all of them anew."""
    prompts = sentences(options.prompts)
    path, content = located(options.path), prompts.fingerprint()
    tables = sorted(path.glob("*.parquet")) if path.is_dir() else []
    for table in tables:
        yield from cut(parquet_count(table), shard_rows, file=table.name, bytes=size_of(table), content=content)
    if tables:
        return
    classes, broken = _classes(path)
    labels = _labels(options, sorted({synset for synset, _ in classes}), len(prompts.names))
    for synset, name in classes:
        with _class(path, name) as files:
            count = len(samples_in(files, synset))
        size = size_of(path if path.is_file() else path / name)
        yield from cut(count, shard_rows, file=name, bytes=size, content=content, label=labels[synset])
    if broken:
        yield Slice(0, 1, bytes=size_of(path), content=content)


def _classes(path: Path) -> tuple[list[tuple[str, str]], Rejected | None]:
    """(synset, name of the tar or folder with its images), in sorted order; and what is wrong with the tar of tars."""
    broken = None
    if path.is_file():
        with opened(path) as files:
            listed = list(files)
        names = {file[0] for file in listed if not isinstance(file, Rejected) and file[0].endswith(".tar")}
        broken = next((file for file in listed if isinstance(file, Rejected)), None)
    else:
        names = {tar.name for tar in path.glob("*.tar")} or {entry.name for entry in path.iterdir() if entry.is_dir()}
    return sorted((_synset(name), name) for name in names), broken


def _synset(name: str) -> str:
    return without_kind(Path(name).name)


def _class(path: Path, name: str) -> AbstractContextManager[Iterator[File | Rejected]]:
    """The images of a class: a tar inside the official one, or a tar or folder inside a folder."""
    return opened(path, name) if path.is_file() else opened(path / name)


def _labels(options: ImageNetOptions, classes: list[str], names: int) -> dict[str, int]:
    """Synset -> label of the classes that are there. Raises ConfigError when they cannot be numbered."""
    order = classes
    if options.synsets:
        lines = located(options.synsets).read_text(encoding="utf-8").splitlines()
        order = [line.split()[0] for line in lines if line.strip()]
    if len(order) != names or not set(classes) <= set(order):
        raise ConfigError(
            f"{options.synsets or options.path!r}: {len(order)} classes, but {names} class names in "
            f"{options.prompts or 'imagenet_prompts.yaml'!r}. "
            f"A part of ImageNet needs source.options.synsets, the list of all its classes in order"
        )
    return {synset: order.index(synset) for synset in classes}


# ----------------------------------------------------------------------------------------- reading


def rows(options: ImageNetOptions, piece: Slice, seed: int) -> Iterator[Row | RowError]:
    """The images of one slice with `class_name` and `class_prompt`."""
    prompts, path, name = sentences(options.prompts), located(options.path), piece.file or ""
    file = as_planned(path if path.is_file() else path / name, piece)
    if piece.file is None:  # what the tar of tars held besides
        yield named(path.name, _classes(path)[1] or Rejected("broken_archive", "it breaks off"))
        return
    if piece.label is None:
        make = partial(_table_row, seed=seed, prompts=prompts)
        for number, entry in enumerate(parquet_rows(file, piece, ["image", "label"]), piece.start):
            yield row_of(f"{without_kind(name)}/{number:07d}", entry, make)
        return

    def row(key: str, found: Contents) -> Row:
        return image_row(key, found["image"], **prompts.texts(piece.label or 0, seed, key))

    with _class(path, name) as files:
        yield from rows_in(samples_in(files, _synset(name))[piece.start : piece.stop], row)


def _table_row(key: str, entry: Row, seed: int, prompts: Sentences) -> Row:
    image = entry["image"]["bytes"] if isinstance(entry["image"], dict) else entry["image"]
    label = entry["label"]
    if not image:
        raise Rejected("missing_image", "the row has no bytes of an image")
    if too_large := oversize(len(image)):
        raise too_large
    if label is None or not 0 <= int(label) < len(prompts.names):
        raise Rejected("no_label", f"label {label} is none of 0 to {len(prompts.names) - 1}")
    return image_row(key, image, **prompts.texts(int(label), seed, key))


SOURCE = Source(ImageNetOptions, slices, rows, paths=("path", "prompts", "synsets"), seeded=True)
