"""Rows that a stage leaves out: beside its shards, named with a reason and a detail, never with their bytes.

In: a task and what its worker rejected. Out: one table for each shard that has any, under the shard's name; how many
there are of each reason; and, of a finished stage, what its losses say about its input.

A reason is one word for counting. What the card's rules drop was decided; all else is a loss: of `transport`, where
the web did not give a row, or of `content`, where what came is of no use.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unifork.config.card import Losses
from unifork.shards.manifest import Manifest, Shard, write_atomically
from unifork.shards.stores import deliver
from unifork.shards.task import ShardTask

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
    rows = [{name: _plain(row.get(name) or "") for name in SCHEMA.names} for row in rejected]
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
    kept = table.filter(pc.invert(pc.is_in(table.column("key"), value_set=gone)))
    if kept.num_rows < table.num_rows:
        path = folder / QUARANTINE / parquet_name(shard.path)
        write_atomically(path, partial(pq.write_table, kept))
        deliver(path, f"{shard.store.uri}/{QUARANTINE}" if shard.store else None)


# -------------------------------------------------------------------------------- what the losses say


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
