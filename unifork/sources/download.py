"""The worker of the download stage: a slice of a source in, an image-text shard out.

A plain callable class without Ray; `unifork.cluster.map_shards` decides whether it runs in this process or as an
actor. Entries of which no row can be made go to the quarantine, with reason and detail.
"""

from collections.abc import Iterator
from pathlib import Path

from unifork.config import Card
from unifork.shards.job import ShardJob, quarantined, table_of, write_shard
from unifork.shards.schema import columns_of, image_text_schema
from unifork.shards.task import ShardResult, ShardTask
from unifork.sources import Fault, Row, plan, rows_of, source_of

DOWNLOAD_VERSION = 1
"""Raise when the same card and task would give other rows."""


class Materialise:
    """Rows of a source -> image-text shard."""

    quarantined: tuple[str, ...] = ("key", "reason", "detail", "image")
    """What is told of a fault."""

    def __init__(self, card: Card) -> None:
        self.card, self.schema = card, image_text_schema(card)

    def rows(self, task: ShardTask) -> Iterator[Row | Fault]:
        """The rows of one planned shard, with their images."""
        return rows_of(self.card, task)

    def __call__(self, task: ShardTask) -> ShardResult:
        kept, rejected = [], []
        for row in self.rows(task):
            if isinstance(row, Fault):
                rejected.append({name: getattr(row, name) for name in self.quarantined})
            else:
                columns = {name: str(row[name]) for name in self.card.columns if row.get(name) is not None}
                kept.append({"license": self.card.licence, **row, **columns})
        kept.sort(key=lambda row: row["key"])
        return write_shard(task, table_of(kept, self.schema), quarantined(task, rejected))


def download_job(card: Card, rows: int | None, shard_rows: int, seed: int, folder: Path, version: int = 0) -> ShardJob:
    """The plan of the download stage: one task for each slice of the source. Raises ConfigError or DataError.

    version: of a worker that fetches what the source names (`unifork.sources.web`).
    """
    source, options = source_of(card)
    columns = columns_of(image_text_schema(card))
    made_with = {
        "version": [DOWNLOAD_VERSION, source.version, version],
        "source": {"kind": card.source.kind, "options": options.model_dump(mode="json", exclude={"access"})},
        "columns": columns,
        "licence": card.licence,
    }
    lineage = {"source": card.source.model_dump(mode="json"), "licence": card.licence, "attribution": card.attribution}
    tasks = plan(card, rows, shard_rows, seed)
    return ShardJob("image-text", card.name, folder, columns, made_with, lineage, tasks)
