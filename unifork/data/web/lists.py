"""Lists of URLs in Parquet files: the plan of their shards, and the rows of one shard.

A shard is a range of rows of one file, so that a further file adds shards and changes none. What a list holds
enters the fingerprint of its shards by the file's name, size and the hash of its footer, which is read in no time.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from unifork.config import Card, parse
from unifork.data.schema import text_columns
from unifork.data.web.rules import UrlList
from unifork.errors import ConfigError, DataError

DEFAULT_COLUMNS: dict[str, str | tuple[str, ...]] = {"url": "url", "caption": ("caption", "text"), "license": "license"}
"""How LAION, COYO and img2dataset spell what every list has, upper and lower case being one."""
OPTIONAL = ("caption", "license")
"""What a list may lack unless the card asks for it."""
BATCH_ROWS = 10_000


def options_of(card: Card) -> UrlList:
    """The typed options of a card's source. Raises ConfigError."""
    return parse(UrlList, card.source.options, f"card {card.name}: source.options")


def list_files(card: Card) -> list[Path]:
    """The files a card names. Raises DataError when a pattern matches none, ConfigError when names repeat."""
    options, files = options_of(card), list[Path]()
    for pattern in options.files:
        found = sorted(glob(pattern, recursive=True))
        if not found:
            raise DataError(f"card {card.name}: source.options.files: nothing is called {pattern!r} in {Path.cwd()}")
        files += map(Path, found)
    twice = [name for name, count in Counter(path.stem for path in files).items() if count > 1]
    if twice:
        raise ConfigError(
            f"card {card.name}: source.options.files: {twice[0]!r} comes twice; "
            "file names must differ, since keys begin with them"
        )
    return files


def plan_lists(card: Card, rows: int | None, shard_rows: int) -> list[dict[str, Any]]:
    """One task per range of at most `shard_rows` rows of a file, of the first `rows` rows in all.

    Raises ConfigError or DataError when files or columns are missing.
    """
    tasks: list[dict[str, Any]] = []
    left = math.inf if rows is None else rows
    for path in list_files(card):
        if left <= 0:
            break
        with pq.ParquetFile(path) as file:
            spellings(file.schema_arrow.names, card, path)
            count = int(min(left, file.metadata.num_rows))
        left -= count
        identity = {"file": str(path), "bytes": path.stat().st_size, "footer": _footer_sha256(path)}
        tasks += [
            {**identity, "start": start, "stop": min(start + shard_rows, count)}
            for start in range(0, count, shard_rows)
        ]
    return tasks


def _footer_sha256(path: Path) -> str:
    """Hash of a Parquet footer: schema, sizes and statistics of all column chunks, with their offsets."""
    with open(path, "rb") as handle:
        handle.seek(-8, 2)
        length = int.from_bytes(handle.read(4), "little")
        handle.seek(-8 - length, 2)
        return hashlib.sha256(handle.read(length)).hexdigest()


def spellings(names: Iterable[str], card: Card, path: Path) -> dict[str, str]:
    """Our columns -> those of a list. Raises DataError when a list lacks one that the card needs."""
    names = list(names)
    theirs = {name.casefold(): name for name in names} | {name: name for name in names}
    options = options_of(card)
    chosen = {**DEFAULT_COLUMNS, **options.columns, **({"key": options.key} if options.key else {})}
    found: dict[str, str] = {}
    for ours in {*text_columns(card), *card.columns, *chosen}:
        tried = chosen.get(ours, ours)
        tried = (tried,) if isinstance(tried, str) else tried
        match = next((theirs[t] for name in tried for t in (name, name.casefold()) if t in theirs), None)
        if match is not None:
            found[ours] = match
        elif ours not in OPTIONAL or ours in {*text_columns(card), *card.columns, *options.columns}:
            raise DataError(
                f"{path}: no column {' or '.join(map(repr, tried))} for {ours!r} of card {card.name}; "
                f"the file has {', '.join(names)}. Name the column in source.options.columns"
            )
    return found


def list_rows(card: Card, task: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one shard: key, url, license, texts and kept columns, as strings or None.

    Raises DataError when the file is gone or no longer the one that was planned with.
    """
    path = Path(task["file"])
    if not path.exists() or path.stat().st_size != task["bytes"] or _footer_sha256(path) != task["footer"]:
        raise DataError(f"{path}: missing, or changed since the download was planned; run the stage again")
    rows: list[dict[str, Any]] = []
    with pq.ParquetFile(path) as file:
        names = spellings(file.schema_arrow.names, card, path)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = list(accumulate(sizes))
        groups = [g for g, end in enumerate(ends) if end > task["start"] and end - sizes[g] < task["stop"]]
        first = ends[groups[0]] - sizes[groups[0]]
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=sorted(set(names.values()))):
            begin, end = max(task["start"] - first, 0), min(task["stop"] - first, len(batch))
            if begin < end:
                for number, row in enumerate(batch.slice(begin, end - begin).to_pylist(), first + begin):
                    ours = {name: _text(row[spelled]) for name, spelled in names.items()}
                    rows.append({**ours, "key": ours.get("key") or f"{path.stem}-{number:09d}"})
            first += len(batch)
            if first >= task["stop"]:
                break
    return rows


def _text(value: Any) -> str | None:
    """A value of a list as the shards keep it; a NaN, which pandas writes for a missing number, is missing."""
    return None if value is None or value != value else str(value)  # noqa: PLR0124 - only NaN differs from itself
