"""What a list of `unifork.filters.rules` names is removed from shards that are already finished."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa

from unifork.filters.rules import Entry, Listing, entry_line
from unifork.layout import Layout
from unifork.shards.job import read_table, write_shard
from unifork.shards.manifest import (
    FETCHED,
    MANIFEST,
    RECORD_SUFFIX,
    Shard,
    local_path,
    read_manifest,
    recorded_shards,
    write_manifest,
)
from unifork.shards.task import ShardTask, parquet_name, scrub, without_keys
from unifork.vocabulary import MORE_IMAGES

REASON = "takedown"


def take_down(dataset: str, layout: Layout, entries: Listing) -> tuple[dict[Path, int], list[str]]:
    """Remove the rows that a list names from every finished folder of a data set.

    Gives folder -> rows that went, and the entries of the list that name no row, sorted. Rows are looked up in the
    measured ones, which go last, so that a killed run finds them again. Publications are made anew by
    `unifork publish`, which takes the same list. Raises DataError where nothing was measured yet.
    """
    measured = layout.measured(dataset)
    keys = withdrawn(measured, entries)
    found = {entry for rows in keys.values() for hits in rows.values() for entry in hits}
    made_of_it = [*layout.prepared.glob("*"), *(layout.codes / dataset).glob("*"), layout.signatures(dataset)]
    folders = [*made_of_it, layout.filtered(dataset), layout.raw(dataset), measured]
    finished = [folder for folder in folders if (folder / MANIFEST).exists()]
    gone = {folder: takedown(folder, keys) for folder in finished if read_manifest(folder).dataset == dataset}
    return gone, [entry_line(entry) for entry in sorted(entries.entries - found)]


def withdrawn(folder: Path, entries: Listing) -> dict[str, dict[str, list[Entry]]]:
    """Shard -> key -> entries of every row that a list names; one shard's columns in memory at a time.

    folder: of measured or image-text shards, whose names are those of all shards that were made of them.
    """
    manifest, found = read_manifest(folder), {}
    for shard in manifest.shards:
        more = [name for name in (MORE_IMAGES,) if name in manifest.columns]
        rows = read_table(folder, shard, ["key", "url", "sha256", *more]).to_pylist()
        hits = {row["key"]: hits for row in rows if (hits := entries.match(manifest.dataset, row))}
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
    kept = without_keys(table, gone)
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
