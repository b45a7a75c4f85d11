"""One hop of the data: a list of shard tasks in, one finished shard per task out, manifest last.

A hop can be killed at any moment and run again: finished shards whose inputs, size and hash still
agree are kept, everything else is made anew, and the result has the same bytes. The record of a
shard (`<shard>.done`) is written right after the shard and folded into the manifest at the end.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unifork.config import fingerprint, parse
from unifork.errors import ConfigError, DataError, writing
from unifork.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    checked,
    fault,
    file_sha256,
    keep_only,
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
    """What a hop is about to do."""

    kind: str
    dataset: str
    folder: Path
    columns: dict[str, str]
    """Names and Arrow types of what it writes."""
    made_with: dict[str, Any]
    """Everything besides the task that decides the rows: card sections, versions, identities."""
    lineage: dict[str, Any]
    """What the manifest says about the origin."""
    tasks: list[dict[str, Any]]
    """One per shard; plain data. The output of task i is `part-<i>.parquet`."""
    source: Path | None = None
    """Folder of the input shards; not part of any fingerprint, since data may move."""

    def shard_name(self, index: int) -> str:
        """File name of the shard that task `index` makes."""
        return f"part-{index:05d}.parquet"

    def inputs(self, index: int) -> str:
        """Fingerprint of everything shard `index` is made from."""
        return fingerprint({"made_with": self.made_with, "task": self.tasks[index]})


def rows_of(task: dict[str, Any]) -> int:
    """Rows that a task reads: of a range of its source, of a shard, or as many as it says."""
    if "stop" in task:
        return int(task["stop"] - task["start"])
    return int(task["shard"]["rows"] if "shard" in task else task["rows"])


def write_shard(task: dict[str, Any], table: pa.Table, dropped: Mapping[str, int]) -> dict[str, Any]:
    """Write a task's table as a Parquet shard, atomically, and its record after it: the task's result."""
    path = Path(task["output"])

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer:
            if table.num_rows:  # readers, the library datasets for one, fail on a row group without rows
                writer.write_table(table, row_group_size=ROW_GROUP)

    write_atomically(path, write)
    record = Shard(
        path=path.name,
        rows=table.num_rows,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        inputs=task["inputs"],
        dropped=dict(dropped),
    ).model_dump(mode="json")
    write_json(path.with_name(path.name + RECORD_SUFFIX), record)
    return {"output": task["output"], "shard": record}


def finished_shards(folder: Path) -> dict[str, Shard]:
    """Shards recorded by an earlier run, finished or killed, by file name."""
    records: dict[str, Shard] = {}
    if (folder / MANIFEST).exists():
        try:
            records = {shard.path: shard for shard in read_manifest(folder).shards}
        except DataError:  # a damaged manifest only means that nothing is known to be finished
            records = {}
    for path in folder.glob("*" + RECORD_SUFFIX):
        try:
            shard = parse(Shard, json.loads(path.read_text()), str(path))
        except (ConfigError, ValueError):  # so does a damaged record
            continue
        records[shard.path] = shard
    return records


def run_hops(
    hops: Sequence[Hop],
    map_tasks: Callable[[list[dict[str, Any]], Callable[[dict[str, Any]], None]], Any],
    progress: Callable[["Progress"], None] = lambda _: None,
) -> list[Manifest]:
    """Make every missing or damaged shard of some hops with one set of workers, then write the manifests.

    map_tasks(tasks, on_result) runs the worker on each task and calls on_result with each result; it
    decides where. Raises DataError when a worker did not deliver a shard.
    """
    states = [Progress(hop) for hop in hops]
    todo: list[dict[str, Any]] = []
    owner: dict[str, Progress] = {}
    for state in states:
        tasks = state.begin()
        owner |= {task["output"]: state for task in tasks}
        todo += tasks
        progress(state)

    def on_result(result: dict[str, Any]) -> None:
        state = owner[result["output"]]
        state.add(parse(Shard, result["shard"], f"result of {state.hop.folder}"))
        progress(state)

    if todo:
        map_tasks(todo, on_result)
    return [state.end() for state in states]


class Progress:
    """A running hop: shards and rows done of those known, drops, rate and ETA."""

    def __init__(self, hop: Hop) -> None:
        self.hop = hop
        self.finished: dict[str, Shard] = {}
        self.kept = self.rows = self.known = 0
        self.dropped: Counter[str] = Counter()
        self.started = time.monotonic()

    def begin(self) -> list[dict[str, Any]]:
        """Find out what an earlier run finished; the tasks that are left to do."""
        hop, todo = self.hop, []
        with writing(hop.folder):
            hop.folder.mkdir(parents=True, exist_ok=True)
        known = finished_shards(hop.folder)
        for index, task in enumerate(hop.tasks):
            name, inputs = hop.shard_name(index), hop.inputs(index)
            old = known.get(name)
            if old and old.inputs == inputs and fault(hop.folder, old) is None:
                self.finished[name] = old
            else:
                source = str(hop.source.absolute()) if hop.source else None
                self.known += rows_of(task)
                todo.append({**task, "source": source, "output": str((hop.folder / name).absolute()), "inputs": inputs})
        self.kept = len(self.finished)
        if todo:
            for name, shard in self.finished.items():  # without a manifest the kept shards need their records again
                write_json(hop.folder / (name + RECORD_SUFFIX), shard.model_dump(mode="json"))
            with writing(hop.folder):
                (hop.folder / MANIFEST).unlink(missing_ok=True)
        return todo

    def add(self, shard: Shard) -> None:
        """Count a finished shard."""
        self.finished[shard.path] = shard
        self.rows += shard.rows
        self.dropped.update(shard.dropped)

    def end(self) -> Manifest:
        """Write the manifest. Raises DataError when shards are missing."""
        hop = self.hop
        names = [hop.shard_name(index) for index in range(len(hop.tasks))]
        absent = [name for name in names if name not in self.finished]
        if absent:
            raise DataError(f"{hop.folder}: {len(absent)} of {len(names)} shards were not made, first {absent[0]}")
        manifest = Manifest(
            kind=hop.kind,
            dataset=hop.dataset,
            columns=hop.columns,
            shards=tuple(self.finished[name] for name in names),
            lineage=hop.lineage,
        )
        for beside in hop.folder.iterdir():
            if beside.is_dir():  # what lies there is named like the shards; a kill leaves temporary files
                keep_only(beside, names)
        write_manifest(hop.folder, manifest)
        return manifest

    def __str__(self) -> str:
        done, total, seconds = len(self.finished), len(self.hop.tasks), time.monotonic() - self.started
        new = self.rows + self.dropped.total()
        rate = new / seconds if seconds > 0 else 0.0
        eta = f", {(self.known - new) / rate:.0f} s to go" if rate and done < total else ""
        drops = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        kept = f" ({self.kept} kept from before)" if self.kept else ""
        shards = f"{self.hop.folder}: {done}/{total} shards{kept}"
        return f"{shards}, {new}/{self.known} rows, {rate:.0f} rows/s{eta}{drops and '; dropped ' + drops}"


def read_table(folder: Path, shard: Shard, columns: Iterable[str] | None = None) -> pa.Table:
    """A shard as a table, after checking size and hash."""
    return pq.read_table(checked(folder, shard), columns=list(columns) if columns else None)
