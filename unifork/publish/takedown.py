"""Which rows a takedown list keeps out of a publication, by the code shards they are in.

Code shards know only keys; what else a list names is looked up in the measured rows.
"""

from pathlib import Path

from unifork.errors import DataError
from unifork.filters.rules import Listing
from unifork.filters.takedown import withdrawn
from unifork.shards.job import read_table
from unifork.shards.manifest import MANIFEST, read_manifest


def withdrawn_keys(entries: Listing | None, dataset: str, codes: Path, rows: Path) -> dict[str, list[str]]:
    """Keys to leave out, sorted, by file name of the code shard.

    codes: folder of one view; rows: of the measured rows that its codes were made from.
    Raises DataError when an entry is no key and the measured rows are not there to look it up.
    """
    if entries is None:
        return {}
    prefix = f"{dataset}/"
    keys = {value.removeprefix(prefix) for kind, value in entries.entries if kind == "key" and value.startswith(prefix)}
    others = [entry for entry in entries.entries if entry[0] != "key"]
    if others and not (rows / MANIFEST).exists():
        raise DataError(
            f"{rows}: not there, but {len(others)} entries of the takedown list are no keys, first "
            f"{' '.join(min(others))!r}, and are looked up there. Bring it back, or list keys only"
        )
    if others:
        keys |= {key for hits in withdrawn(rows, entries).values() for key in hits}
    if not keys:
        return {}
    shards = read_manifest(codes).shards
    found = {shard.path: keys & set(read_table(codes, shard, ["key"])["key"].to_pylist()) for shard in shards}
    return {name: sorted(gone) for name, gone in found.items() if gone}
