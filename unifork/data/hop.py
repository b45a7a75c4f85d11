"""One hop of the data: a list of shard tasks in, one finished shard per task out, manifest last.

A hop can be killed at any moment and run again: finished shards whose inputs, size and hash still
agree are kept, everything else is made anew, and the result has the same bytes. The record of a
shard (`<shard>.done`) is written right after the shard and folded into the manifest at the end.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unifork.config import fingerprint, parse
from unifork.errors import DataError
from unifork.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    checked,
    fault,
    file_sha256,
    read_manifest,
    write_atomically,
    write_json,
    write_manifest,
)

RECORD_SUFFIX = ".done"
ROW_GROUP = 256
"""Rows per Parquet row group: the unit of a local read in training."""


@dataclass(frozen=True)
class Hop:
    """What a hop is about to do; plain data, so that it can travel to any worker."""

    kind: str
    dataset: str
    folder: Path
    made_with: dict[str, Any]
    """Everything besides the task that decides the rows: card sections, versions, identities."""
    tasks: list[dict[str, Any]] = field(default_factory=list)
    """One per shard; plain data. The output of task i is `part-<i>.parquet`."""
    source: Path | None = None
    """Folder of the input shards; not part of any fingerprint, since data may move."""

    def shard_name(self, index: int) -> str:
        """File name of the shard that task `index` makes."""
        return f"part-{index:05d}.parquet"

    def inputs(self, index: int) -> str:
        """Fingerprint of everything shard `index` is made from."""
        return fingerprint({"made_with": self.made_with, "task": self.tasks[index]})


def write_shard(path: Path, table: pa.Table, inputs: str, dropped: dict[str, int]) -> Shard:
    """Write a table as a Parquet shard, atomically, and its record after it."""
    write_atomically(
        path, lambda temporary: pq.write_table(table, temporary, row_group_size=ROW_GROUP, compression="zstd")
    )
    record = Shard(
        path=path.name,
        rows=table.num_rows,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        inputs=inputs,
        dropped=dropped,
    )
    write_json(path.with_name(path.name + RECORD_SUFFIX), record.model_dump(mode="json"))
    return record


def finished_shards(folder: Path) -> dict[str, Shard]:
    """Shards recorded by an earlier run, finished or killed, by file name."""
    records: dict[str, Shard] = {}
    if (folder / MANIFEST).exists():
        try:
            records = {shard.path: shard for shard in read_manifest(folder).shards}
        except DataError:  # a damaged manifest only means that nothing is known to be finished
            records = {}
    for path in folder.glob("*" + RECORD_SUFFIX):
        shard = parse(Shard, json.loads(path.read_text()), str(path))
        records[shard.path] = shard
    return records


def run_hop(
    hop: Hop,
    map_tasks: Callable[[list[dict[str, Any]], Callable[[dict[str, Any]], None]], Any],
    columns: dict[str, str],
    lineage: Mapping[str, Any],
    progress: Callable[["Progress"], None] | None = None,
) -> Manifest:
    """Make every missing or damaged shard, then write the manifest.

    map_tasks(tasks, on_result) runs the worker on each task and calls on_result with each record;
    it decides where. Prints one line per finished shard through `progress`.
    Raises DataError when a worker did not deliver a shard.
    """
    hop.folder.mkdir(parents=True, exist_ok=True)
    known = finished_shards(hop.folder)
    records: dict[str, Shard] = {}
    todo = []
    for index, task in enumerate(hop.tasks):
        name, inputs = hop.shard_name(index), hop.inputs(index)
        old = known.get(name)
        if old and old.inputs == inputs and fault(hop.folder, old) is None:
            records[name] = old
        else:
            source = str(hop.source.absolute()) if hop.source else None
            todo.append({**task, "source": source, "output": str((hop.folder / name).absolute()), "inputs": inputs})
    state = Progress(hop, total=len(hop.tasks), kept=len(records))
    state.report(progress)

    def on_result(record: dict[str, Any]) -> None:
        shard = parse(Shard, record, f"result of {hop.folder}")
        records[shard.path] = shard
        state.add(shard)
        state.report(progress)

    if todo:
        for name, shard in records.items():  # without a manifest the kept shards need their records again
            write_json(hop.folder / (name + RECORD_SUFFIX), shard.model_dump(mode="json"))
        (hop.folder / MANIFEST).unlink(missing_ok=True)
        map_tasks(todo, on_result)
    names = [hop.shard_name(index) for index in range(len(hop.tasks))]
    absent = [name for name in names if name not in records]
    if absent:
        raise DataError(f"{hop.folder}: {len(absent)} of {len(names)} shards were not made, first {absent[0]}")
    manifest = Manifest(
        kind=hop.kind,
        dataset=hop.dataset,
        columns=columns,
        shards=tuple(records[name] for name in names),
        lineage=dict(lineage),
    )
    write_manifest(hop.folder, manifest)
    return manifest


class Progress:
    """Counts of a running hop: shards and rows done of those known, drops, rate and ETA."""

    def __init__(self, hop: Hop, total: int, kept: int) -> None:
        self.hop, self.total, self.kept = hop, total, kept
        self.made = self.rows = 0
        self.dropped: dict[str, int] = {}
        self.started = time.monotonic()

    def add(self, shard: Shard) -> None:
        """Count a finished shard."""
        self.made += 1
        self.rows += shard.rows
        for reason, count in shard.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def report(self, sink: Callable[["Progress"], None] | None) -> None:
        """Hand the state to whoever shows it."""
        if sink:
            sink(self)

    def __str__(self) -> str:
        done, seconds = self.kept + self.made, time.monotonic() - self.started
        left = self.total - done
        eta = f", {left * seconds / self.made:.0f} s to go" if self.made and left else ""
        rate = f", {self.rows / seconds:.0f} rows/s" if self.made and seconds > 0 else ""
        drops = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        kept = f" ({self.kept} kept from before)" if self.kept else ""
        shards = f"{self.hop.folder}: {done}/{self.total} shards{kept}"
        return f"{shards}, {self.rows} new rows{rate}{eta}{drops and '; dropped ' + drops}"


def read_table(folder: Path, shard: Shard, columns: Iterable[str] | None = None) -> pa.Table:
    """A shard as a table, after checking size and hash."""
    return pq.read_table(checked(folder, shard), columns=list(columns) if columns else None)
