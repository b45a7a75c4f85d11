"""Lists of what must not be used: applied by the filter, and again to shards that are already finished.

A list is a text file, one entry per line: `url ADDRESS`, `host NAME` (and every host below it), `sha256 HEX`
(of the image as received), `key SET/KEY`. `#` begins a comment. It is held in memory as a set of strings.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from unifork.errors import ConfigError
from unifork.layout import Layout
from unifork.shards.job import read_table, recorded_shards, write_shard
from unifork.shards.manifest import (
    FETCHED,
    MANIFEST,
    RECORD_SUFFIX,
    Shard,
    file_sha256,
    local_path,
    read_manifest,
    write_manifest,
)
from unifork.shards.quarantine import parquet_name, scrub
from unifork.shards.task import ShardTask
from unifork.sources import located
from unifork.vocabulary import MORE_IMAGES

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
        hashes = [image.get("sha256") or "" for image in (row, *(row.get(MORE_IMAGES) or ()))]
        candidates = [("key", f"{dataset}/{row['key']}"), ("url", url), *(("sha256", text.lower()) for text in hashes)]
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


def take_down(dataset: str, layout: Layout, entries: Listing) -> dict[Path, int]:
    """Remove the rows that a list names from every finished folder of a data set; folder -> rows that went.

    They are looked up in the measured rows, which go last, so that a killed run finds them again. Publications are
    made anew by `unifork publish`, which takes the same list. Raises DataError where nothing was measured yet.
    """
    measured = layout.measured(dataset)
    keys = withdrawn(measured, entries)
    made_of_it = [*layout.prepared.glob("*"), *(layout.codes / dataset).glob("*"), layout.signatures(dataset)]
    folders = [*made_of_it, layout.filtered(dataset), layout.raw(dataset), measured]
    finished = [folder for folder in folders if (folder / MANIFEST).exists()]
    return {folder: takedown(folder, keys) for folder in finished if read_manifest(folder).dataset == dataset}


def withdrawn(folder: Path, entries: Listing) -> dict[str, dict[str, str]]:
    """Shard -> key -> entry of every row that a list names; one shard's columns in memory at a time.

    folder: of measured or image-text shards, whose names are those of all shards that were made of them.
    """
    manifest, found = read_manifest(folder), {}
    for shard in manifest.shards:
        more = [name for name in (MORE_IMAGES,) if name in manifest.columns]
        rows = read_table(folder, shard, ["key", "url", "sha256", *more]).to_pylist()
        hits = {row["key"]: hit for row in rows if (hit := entries.match(manifest.dataset, row))}
        if hits:
            found[shard.path] = hits
    return found


def takedown(folder: Path, keys: Mapping[str, Iterable[str]]) -> int:
    """Remove rows from finished shards of any stage (shard -> keys), write the manifest anew; rows that went.

    Only these shards are opened, and written atomically with their records where they hold such a row, so a killed
    run is finished by running it again; in between the manifest names the old hashes and readers stop. Fingerprints
    stay, so that a stage that runs again keeps the shards as they are; the stages that follow make those shards anew.
    """
    manifest = read_manifest(folder)
    recorded = recorded_shards(folder, manifest.stores)
    shards = []
    for shard in (recorded.get(listed.path, listed) for listed in manifest.shards):
        named = keys.get(parquet_name(shard.path))
        shards.append(_without(folder, shard, named) if named else shard)
    less = manifest.model_copy(update={"shards": tuple(shards)})
    write_manifest(folder, less)
    for place in manifest.stores:
        place.remove([name for name in place.listing() if name.endswith(RECORD_SUFFIX)])
    return manifest.rows - less.rows


def _without(folder: Path, shard: Shard, keys: Iterable[str]) -> Shard:
    """A shard without some rows, as it is now recorded; its quarantine names them no more either."""
    gone, table = pa.array(sorted(set(keys)), pa.string()), read_table(folder, shard)
    kept = table.filter(pa.compute.invert(pa.compute.is_in(table["key"], value_set=gone)))
    count = table.num_rows - kept.num_rows
    if count:
        dropped = {**shard.dropped, REASON: shard.dropped.get(REASON, 0) + count}
        store = shard.store.uri if shard.store else None
        task = ShardTask().placed(None, folder / shard.path, store, shard.inputs)
        for parent in folder.parents if store else ():  # copies that training made
            local_path(folder, shard, parent / FETCHED).unlink(missing_ok=True)
        shard = write_shard(task, kept, dropped).shard or shard
    scrub(folder, shard, gone)
    return shard
