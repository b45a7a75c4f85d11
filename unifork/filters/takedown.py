"""Lists of what must not be used: applied by the filter, and again to shards that are already finished.

A list is a text file, one entry per line: `url ADDRESS`, `host NAME` (and every host below it), `sha256 HEX`
(of the image as received), `key SET/KEY`. `#` begins a comment. It is held in memory as a set of strings.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from unifork.errors import ConfigError
from unifork.shards.job import read_table, recorded_shards, write_shard
from unifork.shards.manifest import (
    FETCHED,
    RECORD_SUFFIX,
    Manifest,
    file_sha256,
    local_path,
    read_manifest,
    write_manifest,
)
from unifork.shards.quarantine import scrub
from unifork.shards.task import ShardTask
from unifork.sources import located

KINDS = ("url", "host", "sha256", "key")
REASON = "takedown"


class Listing:
    """The entries of a list."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError naming the first line that is no entry."""
        self.entries: set[tuple[str, str]] = set()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split(maxsplit=1)
            if not words or words[0].startswith("#"):
                continue
            if words[0] not in KINDS or len(words) != 2:
                raise ConfigError(f"{path}:{number}: {line!r} is no entry; {' | '.join(KINDS)}, a blank, and the value")
            value = words[1].strip()
            self.entries.add((words[0], value if words[0] in ("url", "key") else value.lower()))

    def match(self, dataset: str, row: dict[str, Any]) -> str | None:
        """The entry that names a row with `key`, `url` and `sha256`, or None."""
        url = row.get("url") or ""
        candidates = [("key", f"{dataset}/{row['key']}"), ("url", url), ("sha256", (row.get("sha256") or "").lower())]
        hit = next((entry for entry in [*candidates, *_hosts(url)] if entry in self.entries), None)
        return None if hit is None else " ".join(hit)


def _hosts(url: str) -> list[tuple[str, str]]:
    """`a.b.org` as the hosts a.b.org, b.org and org."""
    try:
        parts = (urlsplit(url).hostname or "").lower().split(".")
    except ValueError:
        return []
    return [("host", ".".join(parts[number:])) for number in range(len(parts))]


def listing(text: str) -> Listing:
    """The list that a card names, read once while it does not change. Raises ConfigError."""
    path = located(text)
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, _changed: int, _bytes: int) -> Listing:
    return Listing(path)


def list_hashes(files: Iterable[str]) -> dict[str, str]:
    """Name -> hash of its content, for the fingerprint of what lists decide."""
    return {text: file_sha256(located(text)) for text in files}


# -------------------------------------------------------------------------------- finished shards


def withdrawn(folder: Path, entries: Listing) -> dict[str, str]:
    """Key -> entry of every row of image-text shards that a list names; one shard's texts in memory at a time."""
    manifest = read_manifest(folder)
    found = {}
    for shard in manifest.shards:
        for row in read_table(folder, shard, ["key", "url", "sha256"]).to_pylist():
            hit = entries.match(manifest.dataset, row)
            if hit:
                found[row["key"]] = hit
    return found


def takedown(folder: Path, keys: Iterable[str]) -> Manifest:
    """Remove rows from finished shards (images or codes) by key and write the manifest anew.

    Only shards that hold such a row are written, each atomically with its record, so a killed run is
    finished by running it again; in between the manifest names the old hashes and readers stop. Stage by
    stage: what `withdrawn` finds in `data/raw/<set>` goes from raw, filtered and every folder of codes. Fingerprints
    stay, so that a stage that runs again keeps the shards as they are; the stages that follow make those shards anew.
    """
    manifest, gone = read_manifest(folder), pa.array(sorted(set(keys)), pa.string())
    recorded = recorded_shards(folder, manifest.stores)
    shards = []
    for shard in (recorded.get(listed.path, listed) for listed in manifest.shards):
        named = pa.compute.is_in(read_table(folder, shard, ["key"]).column("key"), value_set=gone)
        count = pa.compute.sum(named).as_py() or 0
        if count:
            table = read_table(folder, shard).filter(pa.compute.invert(named))
            dropped = {**shard.dropped, REASON: shard.dropped.get(REASON, 0) + count}
            store = shard.store.uri if shard.store else None
            task = ShardTask().placed(None, folder / shard.path, store, shard.inputs)
            for parent in folder.parents if store else ():  # copies that training made
                local_path(folder, shard, parent / FETCHED).unlink(missing_ok=True)
            shard = write_shard(task, table, dropped).shard or shard  # noqa: PLW2901
        scrub(folder, shard, gone)
        shards.append(shard)
    manifest = manifest.model_copy(update={"shards": tuple(shards)})
    write_manifest(folder, manifest)
    for place in manifest.stores:
        place.remove([name for name in place.listing() if name.endswith(RECORD_SUFFIX)])
    return manifest
