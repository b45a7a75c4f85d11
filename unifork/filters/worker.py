"""The workers of the download and filter hops: one task in, one finished shard out.

Each is a plain callable class without Ray; `unifork.cluster.map_shards` decides whether it runs in
this process or as an actor. A task carries `output`, `inputs` and what the hop planned for it.
"""

from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unifork.config import Card, parse
from unifork.errors import ConfigError, DataError
from unifork.filters.rules import TAKEDOWN, TWIN_RULES, TWINS, judge
from unifork.filters.takedown import list_hashes
from unifork.shards.job import QUARANTINE, Hop, read_table, write_shard
from unifork.shards.manifest import Manifest, Shard, file_sha256, read_manifest, write_atomically
from unifork.shards.schema import columns_of, image_text_schema
from unifork.shards.stores import deliver
from unifork.shards.task import ShardTask, Slice
from unifork.sources import Fault, plan, rows_of, source_of

DOWNLOAD_VERSION = 1
"""Raise when the same card and task would give other rows."""
FILTER_VERSION = 1
"""Raise when the same rows would be judged otherwise."""

DROPS = "twins"
"""Folder beside the filtered shards: the rows of each that have an earlier twin (`unifork.filters.duplicates`)."""


class Materialise:
    """Rows of a source -> image-text shard; entries of which no row can be made go to the quarantine."""

    def __init__(self, card: dict[str, Any]) -> None:
        self.card = parse(Card, card, "card")
        self.schema = image_text_schema(self.card)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        kept, rejected = [], []
        for one in rows_of(self.card, planned(task)):
            if isinstance(one, Fault):
                rejected.append({"key": one.key, "reason": one.reason, "detail": one.detail, "image": one.image})
            else:
                columns = {name: str(one[name]) for name in self.card.columns if one.get(name) is not None}
                kept.append({"license": self.card.licence, **one, **columns})
        kept.sort(key=lambda row: row["key"])
        return write_shard(task, table_of(kept, self.schema), quarantined(task, rejected))


def download_hop(card: Card, rows: int | None, shard_rows: int, seed: int, folder: Path) -> Hop:
    """The plan of the download hop."""
    tasks = [as_dict(task) for task in plan(card, rows, shard_rows, seed)]
    columns = columns_of(image_text_schema(card))
    made_with = {"version": DOWNLOAD_VERSION, "columns": columns, "licence": card.licence, **origin(card)}
    lineage = {"source": card.source.model_dump(mode="json"), "licence": card.licence, "attribution": card.attribution}
    return Hop("image-text", card.name, folder, columns, made_with, lineage, tasks)


def origin(card: Card) -> dict[str, Any]:
    """What decides a card's rows beside the slice: the source, its version and its options."""
    source, options = source_of(card)
    plain = options.model_dump(mode="json")
    return {"kind": card.source.kind, "source_version": source.version, "options": plain}


def as_dict(task: ShardTask) -> dict[str, Any]:
    """A planned task as the plain data of a hop."""
    return {**(asdict(task.piece) if task.piece else {}), "seed": task.seed}


def planned(task: dict[str, Any]) -> ShardTask:
    """The other way round."""
    return ShardTask.from_source(Slice(**{field.name: task[field.name] for field in fields(Slice)}), task["seed"])


class Filter:
    """Image-text shard -> the rows its card keeps; the rest goes to the quarantine with reasons."""

    def __init__(self, card: dict[str, Any]) -> None:
        self.card = parse(Card, card, "card")
        self.schema = image_text_schema(self.card)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        kept, rejected = [], []
        twins = twins_of(task)
        for row in read_rows(task):
            verdict = judge({**row, TWINS: twins[row["key"]]} if row["key"] in twins else row, self.card)
            if verdict is None:
                kept.append(row)
            else:
                image = b"" if verdict[0] == TAKEDOWN else row["image"]
                rejected.append({"key": row["key"], "reason": verdict[0], "detail": verdict[1], "image": image})
        return write_shard(task, table_of(kept, self.schema), quarantined(task, rejected))


def drops_name(number: int) -> str:
    """File with the rows of shard `number` that have an earlier twin."""
    return f"part-{number:05d}.parquet"


def twins_of(task: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Key -> rule -> earlier twin, of the rows of a task that have one. Raises DataError for a changed list."""
    if "twins" not in task:
        return {}
    path = Path(task["output"]).parent / DROPS / task["twins"]["file"]
    if not path.exists() or file_sha256(path) != task["twins"]["sha256"]:
        raise DataError(f"{path}: missing or changed since it was decided. Run the filter again")
    twins: dict[str, dict[str, str]] = {}
    for row in pq.read_table(path).to_pylist():
        twins.setdefault(row["key"], {})[row["rule"]] = row["of"]
    return twins


def filter_fingerprint(card: Card) -> dict[str, Any]:
    """What decides about a row besides the row: version, rules, and the content of the lists they name."""
    decides = {"version": FILTER_VERSION, "filters": [rule.model_dump(mode="json") for rule in card.filters]}
    lists = list_hashes(rule.options["file"] for rule in card.filters if rule.rule == TAKEDOWN)
    return {**decides, "lists": lists} if lists else decides


def filter_hop(card: Card, source: Path, folder: Path, twins: dict[int, str] | None = None) -> Hop:
    """The plan of the filter hop: one task per image-text shard.

    twins: what `dedup.decide` said, shard number -> hash of its list in `folder`. Raises ConfigError when a
    rule of the card needs it.
    """
    needing = [rule.rule for rule in card.filters if rule.rule in TWIN_RULES]
    if needing and twins is None:
        raise ConfigError(
            f"card {card.name}: the rule {needing[0]} looks at other rows; run python -m pipelines.filter"
        )
    tasks = [
        {**task, "twins": {"file": drops_name(number), "sha256": twins[number]}} if twins and number in twins else task
        for number, task in enumerate(tasks_from(read_manifest(source)))
    ]
    made_with = filter_fingerprint(card)
    lineage = {name: value for name, value in made_with.items() if name != "version"}
    return Hop("image-text", card.name, folder, columns_of(image_text_schema(card)), made_with, lineage, tasks, source)


def quarantined(task: dict[str, Any], rejected: list[dict[str, Any]]) -> Counter[str]:
    """Write what is left out beside the shard, sorted by key; how many there are of each reason."""
    output = Path(task["output"])
    quarantine = output.parent / QUARANTINE / output.name
    if rejected:
        rejected.sort(key=lambda row: (row["key"], row["reason"]))
        write_atomically(quarantine, lambda path: pq.write_table(pa.Table.from_pylist(rejected), path))
        deliver(quarantine, f"{task['store']}/{QUARANTINE}" if task.get("store") else None)
    else:
        quarantine.unlink(missing_ok=True)
    return Counter(row["reason"] for row in rejected)


def tasks_from(manifest: Manifest) -> list[dict[str, Any]]:
    """One task per shard of an earlier hop."""
    # the file name and hash are part of the fingerprint, the folder is not: data may move
    return [{"shard": shard.model_dump(mode="json", exclude={"inputs", "dropped"})} for shard in manifest.shards]


def read_rows(task: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a task's input shard, after checking size and hash."""
    shard = parse(Shard, {**task["shard"], "inputs": ""}, "task")
    rows: list[dict[str, Any]] = read_table(Path(task["source"]), shard).to_pylist()
    return rows


def table_of(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly that schema; columns a row lacks are null, others are left out."""
    names = schema.names
    table = pa.Table.from_pylist(
        [{name: row.get(name) for name in names} for row in rows], schema=pa.schema(list(schema))
    )
    return table.replace_schema_metadata(schema.metadata)
