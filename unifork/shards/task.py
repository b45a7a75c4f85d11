"""The messages between a driver and its workers: what shard to make, what was made, and what was left out.

A job plans one `ShardTask` for each shard; a worker turns it into a finished file and answers with a `ShardResult`.
Both are plain and small (paths, counts, hashes), never images.

Rows that are left out lie beside the shards, named with a reason and a detail, never with their bytes: one table for
each shard that has any, under the shard's name. A reason is one word for counting. What the card's rules drop was
decided; all else is a loss: of `transport`, where the web did not give a row, or of `content`, where what came is of
no use.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unifork.config import fingerprint
from unifork.config.card import Losses
from unifork.shards.manifest import Manifest, Shard, write_atomically
from unifork.stores import deliver
from unifork.vocabulary import Task


@dataclass(frozen=True)
class Slice:
    """Rows of a source that become one shard: entries `start` to `stop - 1` of one of its files."""

    start: int
    stop: int
    file: str | None = None
    """Name of the file within what the card names."""
    bytes: int | None = None
    """Its size when it was planned with."""
    content: str | None = None
    """Its hash, that of its footer, or of what else decides its rows, when it was planned with."""
    offset: int | None = None
    """Byte at which entry `start` begins."""
    again: int | None = None
    """Number of the repetition, for lists that are read several times."""
    label: int | None = None
    """Class of all its entries, where a file holds one class."""

    @property
    def rows(self) -> int:
        """Number of its entries."""
        return self.stop - self.start


@dataclass(frozen=True)
class Published:
    """A shard of a publication, to be made a shard of codes again."""

    uri: str
    """Address of the publication."""
    name: str
    """The shard's name there."""
    sha256: str
    rows: int
    withdrawn: int
    """Rows that were left out when it was published."""
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class ShardTask:
    """One shard to make. What it is made from is one of `piece`, `shard` and `published`.

    Download says `piece` and `seed`, measuring, signatures, prepare `shard`, the filter `duplicates` besides, encode
    `kept`, `kept_folder` and `use`, publish `withdrawn`; fetch says `published`.
    """

    piece: Slice | None = None
    """A slice of the source."""
    seed: int = 0
    """Of a source that makes its rows by itself."""
    shard: Shard | None = None
    """A finished shard of an earlier job."""
    published: Published | None = None
    """A shard of a publication."""
    use: Task | None = None
    """The task whose view is encoded."""
    duplicates: str | None = None
    """SHA-256 of the list of the shard's rows that have an earlier duplicate."""
    withdrawn: tuple[str, ...] = ()
    """Keys that are left out."""
    kept: Shard | None = None
    """A finished shard that names the rows of `shard` that are read."""
    kept_folder: str = ""
    """Its folder; no part of the fingerprint."""
    folder: str = ""
    """Folder of the input shard; like all that follows no part of the fingerprint, since data may move."""
    output: str = ""
    """Path of the shard to write."""
    store: str | None = None
    """Folder of a store that it goes to; None leaves it where it is written."""
    inputs: str = ""
    """Fingerprint of everything it is made from; of a fetched shard that is the one it was, known beforehand."""
    beside: tuple["ShardTask", ...] = ()
    """Shards of other jobs that are made of the same rows at once; of no fingerprint."""

    @property
    def rows(self) -> int:
        """Rows that it reads."""
        parts = (self.piece, self.shard, self.published)
        return next(part.rows for part in (self.kept, *parts) if part is not None)

    def fingerprint(self, made_with: Mapping[str, Any]) -> str:
        """Hash of everything the shard is made from: what lies where decides nothing."""
        what = {
            "piece": self.piece and asdict(self.piece),
            "seed": self.seed,
            "shard": self.shard and self.shard.identity(),
            "kept": self.kept and self.kept.identity(),
            "published": self.published and asdict(self.published),
            "use": self.use,
            "duplicates": self.duplicates,
            "withdrawn": self.withdrawn,
        }
        return fingerprint({"made_with": dict(made_with), **{name: value for name, value in what.items() if value}})

    def placed(self, folder: Path | None, output: Path, store: str | None, inputs: str) -> Self:
        """The task with where its input lies and where its shard goes."""
        source = str(folder.absolute()) if folder else ""
        return replace(self, folder=source, output=str(output.absolute()), store=store, inputs=inputs)


@dataclass(frozen=True)
class ShardResult:
    """What became of a task: a finished shard, or why there is none."""

    output: str
    """Path of the shard, which names the task."""
    shard: Shard | None = None
    problem: str | None = None
    """Why the worker did not make it."""
    traceback: str | None = None
    """Of a mistake of the program."""
    beside: tuple["ShardResult", ...] = ()
    """Of the tasks beside its own."""


def joined(tasks: Sequence[ShardTask]) -> list[ShardTask]:
    """Tasks of the same rows, one beside the other."""
    same: dict[tuple[str | None, ...], list[ShardTask]] = {}
    for task in tasks:
        paths = (shard.path if shard else None for shard in (task.shard, task.kept))
        same.setdefault((task.folder, task.kept_folder, *paths), []).append(task)
    return [replace(first, beside=tuple(others)) for first, *others in same.values()]


# -------------------------------------------------------------------------------- rows that are left out

QUARANTINE = "quarantine"
"""Folder beside the shards, wherever they lie: what was left out, by shard."""
SCHEMA = pa.schema({name: pa.string() for name in ("key", "url", "sha256", "reason", "detail")})
MOST_DETAIL = 1000
"""Letters of a detail that are kept."""
TRANSPORT = {
    "no_such_host", "dns_failure", "connection_failed", "timeout", "tls_failed", "bad_answer", "too_many_redirects",
    "truncated", "deadline", "host_unreachable", "robots_denied", "opted_out", "forbidden_address",
}  # fmt: skip
"""Reasons for which the web did not give a row, besides `http_404` and the like."""
CONTENT = {
    "empty", "not_an_image", "undecodable", "too_many_pixels", "too_many_scans", "too_thin", "too_large", "no_text",
    "unexpected",
}  # fmt: skip
"""Reasons for which a row is of no use wherever it stands. What else a source drops is of no use either."""


def quarantined(task: ShardTask, rejected: Iterable[Mapping[str, str | None]]) -> Counter[str]:
    """Write what is left out beside the shard, sorted by key; how many there are of each reason."""
    rows = [{name: _plain(str(row.get(name) or "")) for name in SCHEMA.names} for row in rejected]
    output = Path(task.output)
    path = output.parent / QUARANTINE / parquet_name(output.name)
    if rows:
        rows.sort(key=lambda row: (row["key"], row["reason"]))
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        write_atomically(path, partial(pq.write_table, table))
        deliver(path, f"{task.store}/{QUARANTINE}" if task.store else None)
    else:
        path.unlink(missing_ok=True)
    return Counter(row["reason"] for row in rows)


def parquet_name(shard: str) -> str:
    """The name of the quarantine of a shard, and of the shards it was made of, which are Parquet whatever it is."""
    return Path(shard).with_suffix(".parquet").name


def _plain(text: str) -> str:
    """Text that UTF-8 can hold: half a surrogate pair of a broken list is written out."""
    return text[:MOST_DETAIL].encode("utf-8", "backslashreplace").decode()


def quarantine_of(folder: Path, shard: Shard) -> Path | BytesIO | None:
    """The quarantine of a shard, to read from; None when there is none."""
    name, store = f"{QUARANTINE}/{parquet_name(shard.path)}", shard.store
    if store is None:
        return folder / name if (folder / name).exists() else None
    data = store.get(name)
    return None if data is None else BytesIO(data)


def scrub(folder: Path, shard: Shard, gone: pa.Array) -> None:
    """Remove rows from the quarantine of a shard by key: it says where they come from."""
    source = quarantine_of(folder, shard)
    if source is None:
        return
    table = pq.read_table(source)
    kept = without_keys(table, gone)
    if kept.num_rows < table.num_rows:
        path = folder / QUARANTINE / parquet_name(shard.path)
        write_atomically(path, partial(pq.write_table, kept))
        deliver(path, f"{shard.store.uri}/{QUARANTINE}" if shard.store else None)


def without_keys(table: pa.Table, gone: pa.Array) -> pa.Table:
    """The rows of a table whose `key` is none of some."""
    return table.filter(pc.invert(pc.is_in(table["key"], value_set=gone)))


def nothing_kept(folder: Path, manifest: Manifest) -> str:
    """Why a stage kept no row: the commonest reason, with an example and where there are more."""
    if not manifest.dropped:
        return f"{folder}: no row came in, so none is kept"
    reason, count = next(iter(manifest.dropped.items()))
    dropped = sum(manifest.dropped.values())
    sources, example = (quarantine_of(folder, shard) for shard in manifest.shards if reason in shard.dropped), ""
    if source := next(filter(None, sources), None):
        row = pq.read_table(source, filters=[("reason", "=", reason)]).slice(0, 1).to_pylist()[0]
        example = f", the first {row['key']!r}: {row['detail']}"
    return f"{folder}: none of {dropped} rows is kept: {count} {reason}{example} (all in {folder / QUARANTINE})"


def warnings_of(manifest: Manifest, stage: str, most: Losses) -> list[str]:
    """A line for each kind of loss of a stage (`download` or `filter`) that is larger than its card expects."""
    everything = manifest.rows + sum(manifest.dropped.values())
    kinds: dict[str, Counter[str]] = {"transport": Counter(), "content": Counter()}
    for reason, count in manifest.dropped.items():
        if reason in TRANSPORT or reason.startswith("http_"):
            kinds["transport"][reason] += count
        elif reason in CONTENT or stage == "download":
            kinds["content"][reason] += count
    lines = []
    for kind, reasons in kinds.items():
        share, limit = reasons.total() / max(1, everything), getattr(most, kind)
        if share > limit:
            named = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
            lines.append(
                f"{manifest.dataset}: {stage} lost {share:.1%} of {everything} rows to {kind} ({named}); expected are "
                f"at most {limit:.0%} (`losses` of its card)"
            )
    return lines
