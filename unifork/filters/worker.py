"""The worker of the filter stage: measured rows in, those that the card keeps out.

A decision is a pure function of a row's columns and measurements. What is dropped goes to the quarantine with its
reason. Which rows have an earlier duplicate was decided before (`unifork.filters.duplicates`) and lies in one list for
each shard.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unifork.config import Card
from unifork.errors import ConfigError, DataError
from unifork.filters.measure import measured_schema
from unifork.filters.rules import DUPLICATE_RULES, DUPLICATES, TAKEDOWN, judge, list_hashes, rules_of
from unifork.shards.job import ShardJob, input_rows, table_of, write_shard
from unifork.shards.manifest import file_sha256, present
from unifork.shards.schema import columns_of
from unifork.shards.task import ShardResult, ShardTask, quarantined

FILTER_VERSION = 2
"""Raise when the same rows would be judged otherwise."""

READ_LATER = {"matte", "tasks", "held_out", "reader"}
"""What a card says to the readers of kept rows; the manifest names it, so that DVC runs them again when it changes."""

DROPS = "duplicates"
"""Folder beside the filtered shards: the rows of each that have an earlier duplicate, by the name of the shard."""


def filtered_schema(card: Card) -> pa.Schema:
    """That of the measured rows, without what can only be said of others."""
    return pa.schema([field for field in measured_schema(card) if not field.name.startswith("problem")])


class Filter:
    """Measured shard -> the rows its card keeps; the rest goes to the quarantine with reasons. No image is read."""

    def __init__(self, card: Card) -> None:
        self.card, self.schema = card, filtered_schema(card)

    def __call__(self, task: ShardTask) -> ShardResult:
        kept, rejected = [], []
        duplicates = duplicates_of(task)
        for row in input_rows(task):
            verdict = judge({**row, DUPLICATES: duplicates[row["key"]]} if row["key"] in duplicates else row, self.card)
            if verdict is None:
                kept.append(row)
            else:
                named = {name: row[name] for name in ("key", "url", "sha256")}
                rejected.append({**named, "reason": verdict[0], "detail": verdict[1]})
        return write_shard(task, table_of(kept, self.schema), quarantined(task, rejected))


def duplicates_of(task: ShardTask) -> dict[str, dict[str, str]]:
    """Key -> rule -> earlier duplicate, of the rows of a task that have one. Raises DataError for a changed list."""
    if task.duplicates is None:
        return {}
    output = Path(task.output)
    path = output.parent / DROPS / output.name
    if not path.exists() or file_sha256(path) != task.duplicates:
        raise DataError(f"{path}: missing or changed since it was decided. Run the filter again")
    found: dict[str, dict[str, str]] = {}
    for row in pq.read_table(path).to_pylist():
        found.setdefault(row["key"], {})[row["rule"]] = row["of"]
    return found


def filter_fingerprint(card: Card) -> dict[str, Any]:
    """What decides about a row besides the row: version, rules, and the content of the lists they name."""
    decides = {
        "version": [FILTER_VERSION, *(rule.version for rule, _ in rules_of(card))],
        "filters": [entry.model_dump(mode="json") for entry in card.filters],
    }
    lists = list_hashes(rule.options["file"] for rule in card.filters if rule.rule == TAKEDOWN)
    return {**decides, "lists": lists} if lists else decides


def filter_job(card: Card, measured: Path, folder: Path, duplicates: dict[int, str] | None = None) -> ShardJob:
    """The plan of the filter stage: one task for each measured shard.

    duplicates: what `duplicates.decide` said, shard number -> hash of its list in `folder`. Raises ConfigError when a
    rule of the card needs it.
    """
    needing = [rule.rule for rule in card.filters if rule.rule in DUPLICATE_RULES]
    if needing and duplicates is None:
        raise ConfigError(
            f"card {card.name}: the rule {needing[0]} looks at other rows; run python -m pipelines.filter"
        )
    lists = duplicates or {}
    tasks = [ShardTask(shard=shard, duplicates=lists.get(n)) for n, shard in enumerate(present(measured).shards)]
    made_with = filter_fingerprint(card)
    lineage = {name: value for name, value in made_with.items() if name != "version"}
    lineage["card"] = card.model_dump(mode="json", include=READ_LATER)
    columns = columns_of(filtered_schema(card))
    return ShardJob("filtered", card.name, folder, columns, made_with, lineage, tasks, measured)
