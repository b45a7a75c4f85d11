"""One hop of the data: a list of shard tasks in, one finished shard per task out, manifest last.

A hop can be killed at any moment and run again: finished shards whose inputs, size and hash still
agree are kept, everything else is made anew, and the result has the same bytes. The record of a
shard (`<shard>.done`) is written right after the shard and folded into the manifest at the end.
With a store, quarantine, shard and record are moved there as soon as they are written, in this
order; a kept shard stays where it is.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unifork.config import fingerprint, parse
from unifork.errors import ConfigError, DataError, writing
from unifork.shards.manifest import (
    MANIFEST,
    RECORD_SUFFIX,
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
from unifork.shards.stores import Store, deliver, open_store

QUARANTINE = "quarantine"
"""Folder beside the shards, wherever they lie: what was left out, by shard."""
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
    store: str | None = None
    """Address of the folder of a store that new shards go to, None: they stay in `folder`; no part of one either."""

    def shard_name(self, index: int) -> str:
        """File name of the shard that task `index` makes."""
        return f"part-{index:05d}.parquet"

    def inputs(self, index: int) -> str:
        """Fingerprint of everything shard `index` is made from."""
        task = self.tasks[index]
        if "uri" in task.get("shard", ()):
            task = {**task, "shard": {name: value for name, value in task["shard"].items() if name != "uri"}}
        return fingerprint({"made_with": self.made_with, "task": task})


def rows_of(task: dict[str, Any]) -> int:
    """Rows that a task reads: of a range of its source, of a shard, or as many as it says."""
    if "stop" in task:
        return int(task["stop"] - task["start"])
    return int(task["shard"]["rows"] if "shard" in task else task["rows"])


def write_shard(task: dict[str, Any], table: pa.Table, dropped: Mapping[str, int]) -> dict[str, Any]:
    """Write a task's table as a Parquet shard, atomically, and its record after it: the task's result."""
    path, store = Path(task["output"]), task.get("store")

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
        uri=store and f"{store}/{path.name}",
    ).model_dump(mode="json")
    deliver(path, store)
    written = path.with_name(path.name + RECORD_SUFFIX)
    write_json(written, record)
    deliver(written, store)
    return {"output": task["output"], "shard": record}


def finished_shards(folder: Path, stores: Iterable[Store] = ()) -> dict[str, Shard]:
    """Shards recorded by an earlier run, finished or killed, here or in stores, by file name."""
    records: dict[str, Shard] = {}
    if (folder / MANIFEST).exists():
        try:
            records = {shard.path: shard for shard in read_manifest(folder).shards}
        except DataError:  # a damaged manifest only means that nothing is known to be finished
            records = {}
    written = [path.read_bytes() for path in folder.glob("*" + RECORD_SUFFIX)]
    for store in stores:
        written += store.get_all([name for name in store.listing() if name.endswith(RECORD_SUFFIX)])
    for record in written:
        try:
            shard = parse(Shard, json.loads(record), "record")
        except (ConfigError, ValueError):  # so does a damaged record
            continue
        records[shard.path] = shard
    return records


def reopen(folder: Path, shards: Iterable[Shard]) -> None:
    """Make a folder one of a killed hop that had finished these shards: records instead of a manifest."""
    for shard in shards:
        write_json(folder / (shard.path + RECORD_SUFFIX), shard.model_dump(mode="json"))
    with writing(folder):
        (folder / MANIFEST).unlink(missing_ok=True)


class Standing:
    """Says whether recorded shards are still what they were; those of a store by size, each folder listed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: dict[str, dict[str, dict[str, Any]]] = {}

    def __call__(self, shard: Shard) -> bool:
        store = shard.store
        if store is None:
            return fault(self.folder, shard) is None
        if store.uri not in self.sizes:
            self.sizes[store.uri] = store.listing()
        return bool(self.sizes[store.uri].get(shard.path, {}).get("size") == shard.bytes)


def forget(folder: Path, store: Store, name: str) -> None:
    """Remove the records of a shard before its object is replaced: size alone would not tell it from the old one."""
    with writing(folder):
        (folder / (name + RECORD_SUFFIX)).unlink(missing_ok=True)
    if store.size(name + RECORD_SUFFIX) is not None:
        store.remove([name + RECORD_SUFFIX])


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
        known = finished_shards(hop.folder, [open_store(hop.store)] if hop.store else [])
        stands = Standing(hop.folder)
        for index, task in enumerate(hop.tasks):
            name, inputs = hop.shard_name(index), hop.inputs(index)
            old = known.get(name)
            if old and old.inputs == inputs and stands(old):
                self.finished[name] = old
            else:
                if old and old.store:
                    forget(hop.folder, old.store, name)
                source = str(hop.source.absolute()) if hop.source else None
                self.known += rows_of(task)
                output = str((hop.folder / name).absolute())
                todo.append({**task, "source": source, "output": output, "store": hop.store, "inputs": inputs})
        self.kept = len(self.finished)
        if todo:
            reopen(hop.folder, self.finished.values())
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
        if hop.store:
            self._tidy(open_store(hop.store), manifest)
        return manifest

    def _tidy(self, store: Store, manifest: Manifest) -> None:
        """Remove from the hop's folder of a store what the manifest does not name, if it names anything there."""
        here = [shard for shard in manifest.shards if shard.uri == f"{self.hop.store}/{shard.path}"]
        if not here:
            return
        named = {shard.path for shard in here} | {f"{QUARANTINE}/{shard.path}" for shard in here if shard.dropped}
        ours = [name for name in store.listing() if name.endswith((".parquet", RECORD_SUFFIX))]
        store.remove([name for name in ours if name not in named])

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


def quarantine_of(folder: Path, shard: Shard) -> Path | BytesIO | None:
    """The quarantine of a shard, to read from; None when there is none."""
    name, store = f"{QUARANTINE}/{shard.path}", shard.store
    if store is None:
        return folder / name if (folder / name).exists() else None
    data = store.get(name)
    return None if data is None else BytesIO(data)
