"""ImageNet-1K in its three forms, each image with its class in one of OpenAI's sentences.

The official tar of one tar per class (or these tars in a folder), a folder per class, or the Parquet of
`ILSVRC/imagenet-1k` on the Hub. Class i is the i-th synset in sorted order, as in torchvision and in the
official code. The sentence is chosen by (seed, key). Images stay as received: some are CMYK, one is a
PNG that is called JPEG.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
from pydantic import Field

from unifork.config import StrictModel, load
from unifork.errors import ConfigError
from unifork.randomness import keyed
from unifork.shards.task import Slice
from unifork.sources import (
    Row,
    RowError,
    Source,
    SourceOptions,
    as_planned,
    cut,
    image_row,
    located,
    parquet_rows,
    without_suffix,
)
from unifork.sources.archives import File, contents, opened, samples_in


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
        count = pq.read_metadata(table).num_rows
        yield from cut(count, shard_rows, file=table.name, bytes=table.stat().st_size, content=content)
    if tables:
        return
    classes = _classes(path)
    for synset, label in _labels(options, list(classes), len(prompts.names)).items():
        name, size = classes[synset]
        with _class(path, name) as files:
            count = len(samples_in(files, synset))
        yield from cut(count, shard_rows, file=name, bytes=size, content=content, label=label)


def _classes(path: Path) -> dict[str, tuple[str, int]]:
    """Synset -> name of the tar or folder with its images, and size of the file it lies in; in sorted order."""
    if path.is_file():
        with opened(path) as files:
            inner = sorted(file[0] for file in files if not isinstance(file, RowError) and file[0].endswith(".tar"))
        return {_synset(name): (name, path.stat().st_size) for name in inner}
    tars = {_synset(tar.name): (tar.name, tar.stat().st_size) for tar in path.glob("*.tar")}
    folders = {entry.name: (entry.name, 0) for entry in path.iterdir() if entry.is_dir()}
    return dict(sorted((tars or folders).items()))


def _synset(name: str) -> str:
    return without_suffix(Path(name).name)


def _class(path: Path, name: str) -> AbstractContextManager[Iterator[File | RowError]]:
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
    if piece.label is None:
        for number, row in enumerate(parquet_rows(file, piece, ["image", "label"]), piece.start):
            yield _table_row(f"{without_suffix(name)}/{number:07d}", row, seed, prompts)
        return
    with _class(path, name) as files:
        for sample in contents(samples_in(files, _synset(name))[piece.start : piece.stop]):
            if isinstance(sample, RowError):
                yield sample
            else:
                key, found = sample
                yield image_row(key, found["image"], **prompts.texts(piece.label, seed, key))


def _table_row(key: str, row: Row, seed: int, prompts: Sentences) -> Row | RowError:
    image = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
    label = row["label"]
    if not image:
        return RowError(key, "missing_image", "the row has no bytes of an image")
    if label is None or not 0 <= int(label) < len(prompts.names):
        return RowError(key, "no_label", f"label {label} is none of 0 to {len(prompts.names) - 1}", image)
    return image_row(key, image, **prompts.texts(int(label), seed, key))


SOURCE = Source(ImageNetOptions, slices, rows, paths=("path", "prompts", "synsets"), seeded=True)
