"""A job over shards: what is missing of it, what was made, and the manifest at its end.

In: one task for each shard. Out: a folder with a finished shard for each task, manifest last. A driver writes

    for result in map_shards(job.missing(), Worker, ...):
        job.add(result)
    manifest = job.finish()

and may be killed at any moment and run again: finished shards whose recorded inputs and size still agree are kept
unread, everything else is made anew, and the result has the same bytes. (Who reads a shard checks its hash;
`unifork verify` checks all of them.) The record of a shard (`<shard>.done`) is written right after the shard and folded
into the manifest at the end. With a store, quarantine, shard and record are moved there as soon as they are written,
in this order; a kept shard stays where it is.

`KeptRows` reads what a filter kept, images included: the only way from a decision back to the bytes. The n-th filtered
shard holds rows of the n-th image-text shard; without a column of images the latter is not opened.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unifork.errors import DataError, writing
from unifork.layout import Layout
from unifork.shards.manifest import (
    RECORD_SUFFIX,
    Manifest,
    Shard,
    checked,
    delete_record,
    file_sha256,
    keep_only,
    present,
    recorded_shards,
    revert_to_records,
    write_atomically,
    write_json,
    write_manifest,
    wrong_sizes,
)
from unifork.shards.progress import places, write_progress
from unifork.shards.task import QUARANTINE, ShardResult, ShardTask, nothing_kept, parquet_name
from unifork.stores import Store, deliver, open_store
from unifork.vocabulary import MORE_IMAGES, ROW_GROUP

ARROW = ".arrow"
NOTED_SECONDS = 5.0
MOST_FAILED = 20
"""Shards of a job that may fail before it stops: the others are worth finishing, a fault of all of them is not."""


@dataclass
class ShardJob:
    """A plan, and how far it has come."""

    kind: str
    dataset: str
    folder: Path
    columns: dict[str, str]
    """Names and Arrow types of what it writes."""
    made_with: dict[str, Any]
    """Everything besides the task that decides the rows: card sections, versions, identities."""
    lineage: dict[str, Any]
    """What the manifest says about the origin."""
    tasks: list[ShardTask]
    """One for each shard, in their order."""
    source: Path | None = None
    """Folder of the input shards; not part of any fingerprint, since data may move."""
    store: str | None = None
    """Address of the folder of a store that new shards go to, None: they stay in `folder`; no part of one either."""
    shard_name: str = "part-{index:05d}.parquet"
    """File name of shard number `index` of `total`."""
    may_be_empty: bool = False
    """Whether it may keep no row at all; elsewhere nothing would follow from nothing."""

    finished: dict[str, Shard] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Shard: why it could not be made."""
    kept: int = 0
    rows_done: int = 0
    rows_known: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    noted: Path | None = None
    """Where others see how far it is, None where nobody looks: beside no lock."""
    noted_at: float = -math.inf

    @property
    def names(self) -> list[str]:
        """File names of all shards."""
        return [self.shard_name.format(index=index, total=len(self.tasks)) for index in range(len(self.tasks))]

    def inputs(self, task: ShardTask) -> str:
        """Fingerprint of everything a shard is made from."""
        return task.inputs or task.fingerprint(self.made_with)

    def missing(self) -> list[ShardTask]:
        """Find out what an earlier run finished; the tasks that are left to do."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        recorded = recorded_shards(self.folder, [open_store(self.store)] if self.store else [])
        wrong = wrong_sizes(self.folder, recorded.values())
        left = []
        for name, task in zip(self.names, self.tasks, strict=True):
            inputs, old = self.inputs(task), recorded.get(name)
            if old and old.inputs == inputs and name not in wrong:
                self.finished[name] = old
            else:
                if old and old.store:
                    delete_record(self.folder, old.store, name)
                left.append(task.placed(self.source, self.folder / name, self.store, inputs))
        self.kept, self.rows_known = len(self.finished), sum(task.rows for task in left)
        if left:
            revert_to_records(self.folder, self.finished.values())
        return left

    def add(self, result: ShardResult) -> None:
        """Count what became of a shard. Raises DataError when more have failed than are worth going on for."""
        if result.shard is None:
            self.failed[Path(result.output).name] = result.problem or "no reason given"
            if len(self.failed) > MOST_FAILED:
                raise self._failure()
            return
        self.finished[result.shard.path] = result.shard
        self.rows_done += result.shard.rows
        self.dropped.update(result.shard.dropped)

    def finish(self) -> Manifest:
        """Write the manifest. Raises DataError naming the shards that were not made, or why no row was kept."""
        if self.failed:
            raise self._failure()
        absent = [name for name in self.names if name not in self.finished]
        if absent:
            raise DataError(
                f"{self.folder}: {len(absent)} of {len(self.tasks)} shards were not made, first {absent[0]}"
            )
        manifest = Manifest(
            kind=self.kind,
            dataset=self.dataset,
            columns=self.columns,
            shards=tuple(self.finished[name] for name in self.names),
            lineage=self.lineage,
        )
        if not manifest.rows and not self.may_be_empty:
            raise DataError(nothing_kept(self.folder, manifest))
        for beside in self.folder.iterdir():
            if beside.is_dir():  # what lies there is named like the shards; a kill leaves temporary files
                keep_only(beside, map(parquet_name, self.names))
        write_manifest(self.folder, manifest)
        if self.store:
            self._tidy(open_store(self.store), manifest)
        for _, place in places(self.folder):
            with suppress(OSError):  # none is there; a disk that takes nothing may say so otherwise
                place.unlink()
        return manifest

    def note(self) -> None:
        """Have others see how far it is, where that was not done a moment ago."""
        if self.noted and time.monotonic() - self.noted_at > NOTED_SECONDS:
            self.noted_at = time.monotonic()
            write_progress(self.noted, **self.facts())

    def facts(self) -> dict[str, Any]:
        """How far it is, as numbers."""
        done, seconds = self.rows_done + self.dropped.total(), time.monotonic() - self.started
        rate = done / seconds if seconds > 0 else 0.0
        left = (self.rows_known - done) / rate if rate else None
        return {
            "done": len(self.finished), "total": len(self.tasks), "failed": len(self.failed),
            "rows": done, "rows_total": self.rows_known, "rows_per_second": rate, "seconds_left": left,
        }  # fmt: skip

    def _failure(self) -> DataError:
        shown = "; ".join(f"{name}: {problem}" for name, problem in sorted(self.failed.items())[:5])
        more = f"; and {len(self.failed) - 5} more" if len(self.failed) > 5 else ""
        return DataError(
            f"{self.folder}: {len(self.failed)} of {len(self.tasks)} shards could not be made: {shown}{more}. "
            f"The {len(self.finished)} finished ones are kept; run the same command again when the cause is mended"
        )

    def _tidy(self, store: Store, manifest: Manifest) -> None:
        """Remove from the job's folder of a store what the manifest does not name, if it names anything there."""
        here = [shard for shard in manifest.shards if shard.uri == f"{self.store}/{shard.path}"]
        if not here:
            return
        named = {shard.path for shard in here} | {f"{QUARANTINE}/{shard.path}" for shard in here if shard.dropped}
        ours = [name for name in store.listing() if name.endswith((".parquet", RECORD_SUFFIX))]
        store.remove([name for name in ours if name not in named])

    def __str__(self) -> str:
        facts = self.facts()
        done, total, rate, left = (facts[name] for name in ("done", "total", "rows_per_second", "seconds_left"))
        eta = f", {left:.0f} s to go" if left is not None and done < total else ""
        drops = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        kept = f" ({self.kept} kept from before)" if self.kept else ""
        failed = f", {len(self.failed)} failed" if self.failed else ""
        rows = f", {facts['rows']}/{self.rows_known} rows, {rate:.0f} rows/s" if self.rows_known else ""
        return f"{self.folder}: {done}/{total} shards{kept}{failed}{rows}{eta}{drops and '; dropped ' + drops}"


# ---------------------------------------------------------------------------------------- one shard


def write_shard(task: ShardTask, table: pa.Table, dropped: Mapping[str, int]) -> ShardResult:
    """Write a task's table as a shard, atomically, and its record after it: the task's result.

    The suffix of its path says what it is: `.parquet`, or `.arrow` for a file that is mapped into memory.
    """
    path, store = Path(task.output), task.store

    def write(temporary: Path) -> None:
        if path.suffix == ARROW:
            with pa.ipc.new_file(str(temporary), table.schema) as writer:
                writer.write_table(table.combine_chunks())
            return
        with pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer:
            if table.num_rows:  # readers, the library datasets for one, fail on a row group without rows
                writer.write_table(table, row_group_size=ROW_GROUP)

    write_atomically(path, write)
    shard = Shard(
        path=path.name,
        rows=table.num_rows,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        inputs=task.inputs,
        dropped=dict(dropped),
        uri=store and f"{store}/{path.name}",
    )
    deliver(path, store)
    record = path.with_name(path.name + RECORD_SUFFIX)
    write_json(record, shard.model_dump(mode="json"))
    deliver(record, store)
    return ShardResult(task.output, shard)


def table_of(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly that schema; columns a row lacks are null, others are left out."""
    names = schema.names
    table = pa.Table.from_pylist(
        [{name: row.get(name) for name in names} for row in rows], schema=pa.schema(list(schema))
    )
    return table.replace_schema_metadata(schema.metadata)


def read_table(folder: Path, shard: Shard, columns: Iterable[str] | None = None) -> pa.Table:
    """A shard as a table, after checking size and hash."""
    source, names = checked(folder, shard), list(columns) if columns else None
    if not shard.path.endswith(ARROW):
        return pq.read_table(source, columns=names)
    table = mapped_table(source) if isinstance(source, Path) else pa.ipc.open_file(source).read_all()
    return table.select(names) if names else table


def mapped_table(path: Path) -> pa.Table:
    """A shard of the suffix `.arrow` without reading it: its columns are views of the file, mapped into memory."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def input_table(task: ShardTask) -> pa.Table:
    """The input shard of a task, after checking size and hash."""
    assert task.shard is not None, f"{task.output}: a task that is made from no shard"
    return read_table(Path(task.folder), task.shard)


def input_rows(task: ShardTask) -> list[dict[str, Any]]:
    """The rows of a task's input shard, after checking size and hash."""
    return list(input_table(task).to_pylist())


# ------------------------------------------------------------------------------- what a filter kept


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
        images = read_table(self.raw, self.raw_shards[number], ["key", "image"])
        place = pc.index(images["key"], key).as_py()
        return None if place < 0 else images["image"][place].as_py()

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
    images_of = ["image"] if columns is None else [name for name in columns if name in ("image", MORE_IMAGES)]
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
