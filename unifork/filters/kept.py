"""The rows that a filter kept, images included: the only way from a decision back to the bytes.

In: the folders of a data set's image-text shards and of its filtered shards, or one shard of each. Out: tables. The
n-th filtered shard holds rows of the n-th image-text shard; without a column of images the latter is not opened.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from unifork.errors import DataError
from unifork.layout import Layout
from unifork.shards.job import read_table
from unifork.shards.manifest import Manifest, Shard, present
from unifork.shards.task import ShardTask
from unifork.vocabulary import MORE_IMAGES

IMAGE = "image"


class KeptRows:
    """All kept rows of a data set. Raises DataError where shards are missing."""

    def __init__(self, layout: Layout, dataset: str, *, images: bool = True) -> None:
        """images: whether the column `image` will be asked for."""
        self.raw, self.filtered = layout.raw(dataset), layout.filtered(dataset)
        self.manifest: Manifest = present(self.filtered)
        self.raw_shards = present(self.raw).shards if images else ()

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The filtered shards, in order."""
        return self.manifest.shards

    def table(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Some columns (None: all) of the kept rows of shard `number`, in its order."""
        raw = self.raw_shards[number] if self.raw_shards else None
        return kept_table(self.raw, raw, self.filtered, self.shards[number], columns)

    def image(self, number: int, key: str) -> bytes | None:
        """The image of any row of shard `number`, kept or not."""
        images = read_table(self.raw, self.raw_shards[number], ["key", IMAGE])
        place = pc.index(images["key"], key).as_py()
        return None if place < 0 else images[IMAGE][place].as_py()

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The same of every shard."""
        return (self.table(number, columns) for number in range(len(self.shards)))


def kept_rows(task: ShardTask, columns: Sequence[str] | None = None) -> pa.Table:
    """The kept rows of a task that reads an image-text shard and what was kept of it."""
    assert task.kept is not None, f"{task.output}: a task without decisions about its rows"
    return kept_table(Path(task.folder), task.shard, Path(task.kept_folder), task.kept, columns)


def kept_table(
    raw: Path, raw_shard: Shard | None, filtered: Path, kept: Shard, columns: Sequence[str] | None = None
) -> pa.Table:
    """The rows that a filtered shard names, with their images where those are asked for.

    Raises DataError for a damaged shard, and where the image-text shard has no row of a key that was kept.
    """
    images_of = [IMAGE] if columns is None else [name for name in columns if name in (IMAGE, MORE_IMAGES)]
    if images_of:
        assert raw_shard is not None, f"{raw}: images were asked for without their shards"
        others = None if columns is None else ["key", *(name for name in columns if name not in ("key", *images_of))]
        table, images = read_table(filtered, kept, others), read_table(raw, raw_shard, ["key", *images_of])
        # both are in the order of keys; a mask, unlike places, never joins chunks, which may hold gigabytes
        images = images.filter(pc.is_in(images["key"], value_set=table["key"].combine_chunks()))
        if not images["key"].equals(table["key"]):
            raise DataError(f"{raw / raw_shard.path}: not the rows that {filtered / kept.path} keeps; filter again")
        for name in images_of:
            table = table.append_column(name, images[name])
        return table if columns is None else table.select(list(columns))
    return read_table(filtered, kept, columns)
