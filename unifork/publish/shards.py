"""Code shards as strangers read them, and back: one published shard per code shard.

A published shard holds the same rows with `codes` as list<list<uint16>>, a list for each image, which every Parquet
reader shows as integers, and says in its schema metadata what they are. Both directions are stages: a killed run
goes on where it was, and equal input gives equal bytes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unifork.config import Card, parse
from unifork.errors import DataError
from unifork.publish.stores import open_store, read
from unifork.shards.job import ShardJob, input_table, read_table, write_shard
from unifork.shards.manifest import Manifest, read_manifest
from unifork.shards.schema import (
    CODES_META,
    codes_array,
    codes_meta,
    codes_type,
    columns_of,
    images_of_rows,
    text_type,
)
from unifork.shards.task import Published, ShardResult, ShardTask, without_keys
from unifork.vocabulary import CODE_DTYPE, Task

PUBLISH_VERSION = 2
"""Raise when the same codes would be published as other bytes."""

PUBLISHED = "published-codes"
"""Kind of the manifest of a published view."""

PUBLISHED_META = b"unifork.published"
"""Schema metadata: JSON with data set, license and how the list of codes is laid out."""

LAYOUT = (
    "a list for each image of the row, of positions x depth codes: raster order of positions, depth last; numbers "
    "start at 0"
)

CODE_LIST = pa.list_(pa.list_(pa.uint16()))
TAKEDOWN = "takedown"

PUBLISHED_SHARD = "train-{index:05d}-of-{total:05d}.parquet"
"""Shards are named as the Hugging Face Hub expects."""


def publish_job(card: Card, task: Task, codes: Path, folder: Path, withdrawn: dict[str, list[str]]) -> ShardJob:
    """One task for each code shard of a view; withdrawn: keys to leave out, by file name of the code shard."""
    origin = read_manifest(codes)
    if origin.kind != "codes" or not origin.shards:
        raise DataError(f"{codes}: {len(origin.shards)} shards of kind {origin.kind!r}; only 'codes' are published")
    about = {name: getattr(card, name) for name in ("title", "homepage", "license", "attribution")}
    about |= {"dataset": card.name, "task": task, "view": card.tasks[task].view, "layout": LAYOUT}
    schema = read_table(codes, origin.shards[0]).schema
    about["shape"] = codes_meta(schema, str(codes))["shape"]
    tasks = [ShardTask(shard=shard, withdrawn=tuple(withdrawn.get(shard.path, ()))) for shard in origin.shards]
    columns = {**columns_of(schema), "codes": str(CODE_LIST)}
    made_with = {"version": PUBLISH_VERSION, "about": about}
    lineage = {"about": about, "codes": origin.content()}
    return ShardJob(PUBLISHED, card.name, folder, columns, made_with, lineage, tasks, codes, shard_name=PUBLISHED_SHARD)


class Publish:
    """Code shard -> published shard."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = json.dumps(about, sort_keys=True).encode()

    def __call__(self, task: ShardTask) -> ShardResult:
        table = input_table(task)
        shape = codes_meta(table.schema, task.folder)["shape"]
        gone = pa.array(task.withdrawn, pa.string())
        kept = without_keys(table, gone)
        numbers = codes_array(kept["codes"], tuple(shape)).reshape(-1).astype(np.uint16)
        images = pa.FixedSizeListArray.from_arrays(pa.array(numbers), shape[0] * shape[1])
        out = _with_codes(kept, images.cast(CODE_LIST.value_type), images_of_rows(kept["codes"]))
        out = out.replace_schema_metadata({**table.schema.metadata, PUBLISHED_META: self.about})
        return write_shard(task, out, {TAKEDOWN: len(gone)} if len(gone) else {})


def fetch_job(published: Manifest, name: str, uri: str, prefix: str, folder: Path) -> ShardJob:
    """One task for each published shard of a view that lies at `prefix` of a store.

    A shard that is whole counts as what it was made of, and is recorded as the encode job recorded it.
    """
    origin = parse(Manifest, published.lineage.get("codes"), f"{uri}: {prefix}: lineage")
    if published.kind != PUBLISHED or len(origin.shards) != len(published.shards):
        raise DataError(
            f"{uri}: {prefix}: {len(published.shards)} shards of kind {published.kind!r} made from "
            f"{len(origin.shards)}; allowed is one {PUBLISHED!r} shard for each"
        )
    tasks = []
    for shard, old in zip(published.shards, origin.shards, strict=True):
        gone = shard.dropped.get(TAKEDOWN, 0)
        here = Published(
            uri, f"{prefix}/{shard.path}", shard.sha256, shard.rows, gone, {**old.dropped, **shard.dropped}
        )
        tasks.append(ShardTask(published=here, inputs="" if gone else old.inputs))
    made_with = {"version": PUBLISH_VERSION}
    return ShardJob("codes", name, folder, origin.columns, made_with, origin.lineage, tasks)


class Fetch:
    """Published shard -> code shard, with the bytes it once had where no row was withdrawn."""

    def __call__(self, task: ShardTask) -> ShardResult:
        shard = task.published
        assert shard is not None, f"{task.output}: a task of no published shard"
        data = read(open_store(shard.uri), shard.name, shard.sha256)
        table = pq.read_table(pa.BufferReader(data))
        place = f"{shard.uri}: {shard.name}"
        shape = codes_meta(table.schema, place)["shape"]
        width = shape[0] * shape[1]
        lists = table["codes"].combine_chunks().flatten()
        if not pc.all(pc.equal(pc.list_value_length(lists), width), min_count=0).as_py():
            raise DataError(f"{place}: images without the {width} codes that its metadata {shape} asks for")
        numbers = lists.flatten().to_numpy().astype(CODE_DTYPE)
        codes = pa.FixedSizeBinaryArray.from_buffers(
            codes_type(width).value_type, len(lists), [None, pa.py_buffer(numbers.tobytes())]
        )
        # Parquet names the parts of lists in its own way; code shards have the names they were written with
        types = {name: text_type(name) for name in table.schema.names} | {"codes": codes_type(width)}
        out = _with_codes(table, codes, images_of_rows(table["codes"])).cast(
            pa.schema(types, metadata=table.schema.metadata)
        )
        out = out.replace_schema_metadata({CODES_META: table.schema.metadata[CODES_META]})
        return write_shard(task, out, shard.dropped)


def _with_codes(table: pa.Table, images: pa.Array, counts: np.ndarray) -> pa.Table:
    """A table with other codes: those of the images of all rows, of which each row has so many."""
    codes = pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(counts)), pa.int32()), images)
    return table.set_column(table.schema.get_field_index("codes"), "codes", codes)
