"""What the bytes of images say, read once: the only place of the filter that looks at an image.

In: an image-text shard. Out: its rows without their images, with what each image measures or why it cannot be used;
of a row without an image nothing is measured.
Whatever decides about rows afterwards (rules, duplicates, lists) reads these shards, so that a changed rule reads no
image.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa

from unifork.config import Card
from unifork.errors import Rejected
from unifork.images import measure
from unifork.shards.job import ShardJob, input_rows, table_of, write_shard
from unifork.shards.manifest import present
from unifork.shards.schema import MORE_IMAGE, columns_of, image_text_schema, numbered
from unifork.shards.task import ShardResult, ShardTask
from unifork.vocabulary import MORE_IMAGES

MEASURE_VERSION = 1
"""Raise when the same image would measure otherwise."""
MEASUREMENTS = {
    "bytes": pa.int64(),
    "scans": pa.int32(),
    "frames": pa.int32(),
    "phash": pa.uint64(),
    "problem": pa.string(),
    "problem_detail": pa.string(),
}
"""Columns beside those of the image-text shard; `problem` is null for an image that can be used."""
UNSAID = ("image", "problem", "problem_detail")
"""Of a further image: its bytes stay where they are, and its problem is that of its row."""


def measured_schema(card: Card) -> pa.Schema:
    """All columns of the image-text shards of a data set but the image, and its measurements."""
    columns = {field.name: field.type for field in image_text_schema(card) if field.name != "image"}
    if MORE_IMAGES in columns:
        values = {**MORE_IMAGE, **MEASUREMENTS}
        columns[MORE_IMAGES] = pa.list_(pa.struct({name: values[name] for name in values if name not in UNSAID}))
    return pa.schema({**columns, **MEASUREMENTS})


class Measure:
    """Image-text shard -> its rows, measured."""

    def __init__(self, card: Card) -> None:
        self.schema = measured_schema(card)

    def __call__(self, task: ShardTask) -> ShardResult:
        return write_shard(task, table_of(list(map(measured, input_rows(task))), self.schema), {})


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what its images measure; the first that cannot be used is its problem."""
    images = [{**image, **measurements(image["image"])} for image in (row, *(row.get(MORE_IMAGES) or ()))]
    for number, image in enumerate(images, 1):
        if image.get("problem"):
            detail = numbered(image["problem_detail"], number, len(images))
            return {**images[0], "problem": image["problem"], "problem_detail": detail, MORE_IMAGES: images[1:]}
    return {**images[0], MORE_IMAGES: images[1:]}


def measurements(data: bytes | None) -> dict[str, Any]:
    """The columns that an image's bytes decide; the sides only where it can be decoded."""
    if data is None:
        return {}
    size = {"bytes": len(data)}
    try:
        return {**size, **measure(data)._asdict()}
    except Rejected as error:
        return {**size, "problem": error.reason, "problem_detail": str(error)}


def measure_job(card: Card, raw: Path, folder: Path) -> ShardJob:
    """The plan of measuring: one task for each image-text shard. Raises DataError."""
    schema = measured_schema(card)
    made_with = {"version": MEASURE_VERSION, "columns": columns_of(schema)}
    tasks = [ShardTask(shard=shard) for shard in present(raw).shards]
    return ShardJob("measured", card.name, folder, columns_of(schema), made_with, {}, tasks, raw)
