"""Rows that must not be published: a list of keys, URLs or SHA-256 of pictures, one a line.

Code shards know only keys. What a URL or a hash belongs to is looked up in the image-text shards.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unifork.errors import ConfigError, DataError
from unifork.manifest import MANIFEST, checked, read_manifest

NAMED_BY = ("key", "url", "sha256")


def read_takedown(path: Path) -> frozenset[str]:
    """The entries of a list; empty lines and lines that begin with `#` say nothing. Raises ConfigError."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file; a takedown list has one key, URL or SHA-256 of a picture per line")
    lines = (line.strip() for line in path.read_text().splitlines())
    return frozenset(line for line in lines if line and not line.startswith("#"))


def withdrawn_keys(entries: frozenset[str], codes: Path, pictures: Path) -> dict[str, list[str]]:
    """Keys to leave out, sorted, by file name of the code shard.

    codes: folder of one view; pictures: the image-text shards its codes were made from.
    Raises DataError when an entry is no key and the image-text shards are not there to look it up.
    """
    if not entries:
        return {}
    keys = set(entries)
    if (pictures / MANIFEST).exists():
        keys |= set(_keys_named(entries, pictures))
    found: dict[str, list[str]] = {}
    for shard in read_manifest(codes).shards:
        here = pq.read_table(checked(codes, shard), columns=["key"])["key"]
        if gone := sorted(keys & set(here.to_pylist())):
            found[shard.path] = gone
    unknown = entries - {key for gone in found.values() for key in gone}
    if unknown and not (pictures / MANIFEST).exists():
        raise DataError(
            f"{len(unknown)} entries of the takedown list are no keys of {codes}, first {min(unknown)!r}; URLs and "
            f"hashes are looked up in {pictures}, which is not there. Bring it back, or list keys only"
        )
    return found


def _keys_named(entries: frozenset[str], pictures: Path) -> Iterator[str]:
    wanted = pa.array(sorted(entries), pa.string())
    for shard in read_manifest(pictures).shards:
        table = pq.read_table(checked(pictures, shard), columns=list(NAMED_BY))
        for column in NAMED_BY:
            yield from table.filter(pc.is_in(table[column], value_set=wanted))["key"].to_pylist()
