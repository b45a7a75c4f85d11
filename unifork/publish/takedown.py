"""Rows that must not be published, by a list: one entry per line, a kind and a value.

`url ADDRESS`, `host NAME` (and every host below it), `sha256 HEX` (of the picture as received), `key SET/KEY`;
`#` begins a comment. Code shards know only keys; the rest is looked up in the image-text shards.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from unifork.data.hop import read_table
from unifork.errors import ConfigError, DataError
from unifork.manifest import MANIFEST, read_manifest

Entries = frozenset[tuple[str, str]]
KINDS = ("url", "host", "sha256", "key")


def read_takedown(path: Path) -> Entries:
    """The entries of a list as (kind, value). Raises ConfigError naming the first line that is none."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file; a takedown list has lines of {', '.join(KINDS)} and a value")
    entries = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        kind, _, value = line.strip().partition(" ")
        if not kind or kind.startswith("#"):
            continue
        if kind not in KINDS or not value.strip():
            raise ConfigError(f"{path}:{number}: {line!r} is no entry; {' | '.join(KINDS)}, a blank, and the value")
        entries.add((kind, value.strip() if kind in ("url", "key") else value.strip().lower()))
    return frozenset(entries)


def withdrawn_keys(entries: Entries, dataset: str, codes: Path, pictures: Path) -> dict[str, list[str]]:
    """Keys to leave out, sorted, by file name of the code shard.

    codes: folder of one view; pictures: the image-text shards its codes were made from.
    Raises DataError when an entry is no key and the image-text shards are not there to look it up.
    """
    prefix = f"{dataset}/"
    keys = {value.removeprefix(prefix) for kind, value in entries if kind == "key" and value.startswith(prefix)}
    others = [entry for entry in entries if entry[0] != "key"]
    if others and not (pictures / MANIFEST).exists():
        raise DataError(
            f"{pictures}: not there, but {len(others)} entries of the takedown list are no keys, first "
            f"{' '.join(min(others))!r}, and are looked up there. Bring it back, or list keys only"
        )
    if others:
        keys |= set(_named(entries, pictures))
    if not keys:
        return {}
    shards = read_manifest(codes).shards
    found = {shard.path: keys & set(read_table(codes, shard, ["key"])["key"].to_pylist()) for shard in shards}
    return {name: sorted(gone) for name, gone in found.items() if gone}


def _named(entries: Entries, pictures: Path) -> Iterator[str]:
    for shard in read_manifest(pictures).shards:
        for row in read_table(pictures, shard, ["key", "url", "sha256"]).to_pylist():
            if not entries.isdisjoint(_names(row)):
                yield row["key"]


def _names(row: dict[str, Any]) -> list[tuple[str, str]]:
    url = row["url"] or ""
    try:
        parts = (urlsplit(url).hostname or "").lower().split(".")
    except ValueError:
        parts = []
    hosts = [("host", ".".join(parts[number:])) for number in range(len(parts))]
    return [("url", url), ("sha256", (row["sha256"] or "").lower()), *hosts]
