"""Duplicates across shards and sets, in two passes: signatures of every shard, then one decision about all.

Pass 1 is a job over shards: for each row that the card's other rules keep, 64 bits of the image's SHA-256, of its
URL and text, and a difference hash of what it shows. Pass 2 reads signatures only and says which rows have an earlier
duplicate: earlier is the order (sets as named, the set itself last; then shards and rows as planned), so neither the
number of workers nor which shard was done first changes anything. The filter then drops what the lists say.

Memory of pass 2: about 90 bytes (measured) for each of at most BUCKET_ROWS rows at a time, since signatures are
visited in buckets, each of which reads all signature shards once; and the list of duplicates itself. That any two
different images agree in 64 bits of SHA-256 is to be expected in one of 3,700 sets of 10^8 rows.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unifork.config import Card, parse
from unifork.errors import ConfigError, Rejected
from unifork.filters.measure import measurements
from unifork.filters.rules import DUPLICATE_RULES, BenchmarkOptions, DuplicateOptions, Kind, judge
from unifork.filters.worker import DROPS, filter_fingerprint
from unifork.shards.job import ShardJob, input_rows, read_table, write_shard
from unifork.shards.manifest import Shard, file_sha256, keep_only, present, read_manifest, write_atomically
from unifork.shards.schema import columns_of, text_columns
from unifork.shards.task import ShardResult, ShardTask
from unifork.sources import MAX_IMAGE_BYTES, located
from unifork.sources.archives import is_image, opened
from unifork.vocabulary import MORE_IMAGES

SIGNATURES_VERSION = 2
BUCKET_ROWS = 4_000_000
SCHEMA = pa.schema({"key": pa.string(), "sha256": pa.uint64(), "pair": pa.uint64(), "phash": pa.uint64()})
DROPS_SCHEMA = pa.schema({"key": pa.string(), "rule": pa.string(), "of": pa.string()})


# --------------------------------------------------------------------------------------- signatures


def signatures_of(row: dict[str, Any], texts: Iterable[str]) -> list[dict[str, Any]]:
    """The signatures of a row and of each further image; `pair` is None without a URL, the others without an image."""
    values = [repr(row.get(name) or "") for name in texts]
    pair = hashlib.blake2b("\x00".join([row["url"], *values]).encode(), digest_size=8).digest() if row["url"] else None
    found = [
        {"key": row["key"], "sha256": image["sha256"] and int(image["sha256"][:16], 16), "phash": image["phash"]}
        for image in (row, *(row.get(MORE_IMAGES) or ()))
    ]
    found[0]["pair"] = pair and int.from_bytes(pair, "big")
    return found


class Sign:
    """Measured shard -> signatures of the rows that the card's other rules keep."""

    def __init__(self, card: Card) -> None:
        self.card = alone(card)

    def __call__(self, task: ShardTask) -> ShardResult:
        texts = text_columns(self.card)
        rows = [row for row in input_rows(task) if judge(row, self.card) is None]
        signatures = [found for row in rows for found in signatures_of(row, texts)]
        return write_shard(task, pa.Table.from_pylist(signatures, schema=SCHEMA), {})


def alone(card: Card) -> Card:
    """A card without the rules that look at other rows."""
    return card.model_copy(update={"filters": tuple(rule for rule in card.filters if rule.rule not in DUPLICATE_RULES)})


def looks_around(card: Card) -> bool:
    """Whether some rule of a card needs the two passes."""
    return any(rule.rule in DUPLICATE_RULES for rule in card.filters)


def sign_job(card: Card, measured: Path, folder: Path) -> ShardJob:
    """The plan of pass 1: one task for each measured shard."""
    made_with = {"signatures": SIGNATURES_VERSION, "texts": text_columns(card), **filter_fingerprint(alone(card))}
    tasks = [ShardTask(shard=shard) for shard in present(measured).shards]
    return ShardJob(
        "signatures", card.name, folder, columns_of(SCHEMA), made_with, {}, tasks, measured, may_be_empty=True
    )


# ----------------------------------------------------------------------------------------- decision

Found = dict[int, tuple[str, int]]
"""Row -> (rule, earlier duplicate). Rows are numbered through all sets; benchmark images have negative numbers."""


def nearest_duplicates(values: np.ndarray, numbers: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    """(number, smallest number of an earlier duplicate) among signatures of which a band agrees, in their order.

    Signatures at most `distance` bits apart agree in one of distance + 1 bands (pigeonhole).
    """
    if distance == 0:  # the band is all of them
        yield from zip(numbers[1:].tolist(), repeat(int(numbers[0])), strict=False)
        return
    for index in range(1, len(values)):
        near = np.bitwise_count(values[:index] ^ values[index]) <= distance
        if near.any():
            yield int(numbers[index]), int(numbers[near.argmax()])


def groups(values: np.ndarray, numbers: np.ndarray, band: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Signatures and numbers, in the order given, of each value of a band that occurs twice."""
    order = np.argsort(band, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(band[order]) != 0, True])
    for begin, end in pairwise(starts.tolist()):
        if end - begin > 1:
            yield values[order[begin:end]], numbers[order[begin:end]]


class Signatures:
    """The signature shards of several sets, numbered through."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.shards = [(folder, shard) for folder in folders for shard in read_manifest(folder).shards]
        self.starts = np.cumsum([0, *(shard.rows for _, shard in self.shards)])

    def column(self, kind: Kind) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Signatures that are there, and their numbers, shard by shard."""
        for (folder, shard), start in zip(self.shards, self.starts, strict=False):
            column = read_table(folder, shard, [kind]).column(kind)
            there = column.is_valid().to_numpy()
            values = column.fill_null(0).to_numpy().astype(np.uint64)
            yield values[there], (np.flatnonzero(there) + start)

    def find(
        self, kind: Kind, distance: int, rule: str, found: Found, extra: np.ndarray | None = None, first: int = 0
    ) -> None:
        """Add rows from number `first` that have an earlier duplicate, among benchmark signatures (`extra`) if any."""
        bands = distance + 1
        width = 64 // bands
        buckets = max(1, -(-int(self.starts[-1]) // BUCKET_ROWS))
        parts = [(extra, np.arange(-len(extra), 0))] if extra is not None else []
        for number in range(bands):
            shift, mask = np.uint64(number * width), np.uint64(2**width - 1)
            for bucket in range(buckets):
                chosen = []
                for values, numbers in chain(parts, self.column(kind)):
                    here = ((values >> shift) & mask) % np.uint64(buckets) == bucket
                    chosen.append((values[here], numbers[here]))
                values, numbers = (np.concatenate(arrays) for arrays in zip(*chosen, strict=True))
                for group in groups(values, numbers, (values >> shift) & mask):
                    for row, duplicate in nearest_duplicates(*group, distance):
                        compared = row >= first and (extra is None or duplicate < 0)
                        if compared and duplicate < found.get(row, ("", row))[1]:
                            found[row] = (rule, duplicate)

    def keys(self, numbers: Iterable[int]) -> dict[int, str]:
        """Key of each of some rows."""
        wanted = np.array(sorted(number for number in numbers if number >= 0), np.int64)
        named: dict[int, str] = {}
        shard_of = np.searchsorted(self.starts, wanted, side="right") - 1
        for index in np.unique(shard_of):
            (folder, shard), rows = self.shards[index], wanted[shard_of == index]
            column = read_table(folder, shard, ["key"]).column("key").take(rows - self.starts[index])
            named.update(zip(rows.tolist(), column.to_pylist(), strict=True))
        return named


def decide(card: Card, signatures: Path, others: dict[str, Path], filtered: Path) -> dict[int, str]:
    """Pass 2: write for each shard the rows that have an earlier duplicate; shard number -> SHA-256 of its list.

    signatures: those of the set itself; others: those of the sets it is compared with, by name;
    filtered: folder of the filtered shards, which holds the lists. Raises ConfigError, DataError.
    """
    own_shards = read_manifest(signatures).shards
    everything: dict[int, tuple[str, str, str]] = {}  # row of the set itself -> key, rule, of
    for entry in card.filters:
        found: Found = {}
        if entry.rule == "duplicates":
            rule = parse(DuplicateOptions, entry.options, f"{card.name}: filter duplicates")
            all_sets = Signatures([*(others[name] for name in rule.against), signatures])
            first = int(all_sets.starts[-1]) - sum(shard.rows for shard in own_shards)
            for kind in rule.by:
                all_sets.find(kind, rule.distance if kind == "phash" else 0, f"same {kind}", found, first=first)
            names = all_sets.keys([*found, *(duplicate for _, duplicate in found.values())])
            details = {
                row: f"{how} as {names[duplicate]}"
                for row, (how, duplicate) in found.items()
                if duplicate < first or names[row] != names[duplicate]  # two images of a row may be alike
            }
        elif entry.rule == "near_benchmark":
            options = parse(BenchmarkOptions, entry.options, f"{card.name}: filter near_benchmark")
            images = benchmark(options.files)
            all_sets, first = Signatures([signatures]), 0
            extra = np.array([value for _, value in images], np.uint64)
            all_sets.find("phash", options.distance, "near", found, extra)
            names = all_sets.keys(found)
            details = {row: f"looks like {images[duplicate][0]}" for row, (_, duplicate) in found.items()}
        else:
            continue
        for row, of in details.items():
            everything.setdefault(row - first, (names[row], entry.rule, of))
    return _write_drops(everything, own_shards, filtered / DROPS)


def benchmark(files: str) -> list[tuple[str, int]]:
    """(name, difference hash) of the images of a folder or tar. Raises ConfigError when there are none."""
    with opened(located(files)) as found:
        named = (file for file in found if not isinstance(file, Rejected) and is_image(file[0]))
        try:
            hashed = [(name, measurements(read(MAX_IMAGE_BYTES))) for name, read in named]
        except Rejected as error:
            raise ConfigError(f"{files!r}: {error}") from None
    if not hashed:
        raise ConfigError(f"{files!r}: no images in it")
    return [(name, phash) for name, found in hashed if (phash := found.get("phash")) is not None]


def _write_drops(rows: dict[int, tuple[str, str, str]], shards: Sequence[Shard], folder: Path) -> dict[int, str]:
    """One list for each shard that has duplicates, named as the shard; shard number -> SHA-256 of its list."""
    starts = np.cumsum([0, *(shard.rows for shard in shards)])
    lists: dict[int, list[dict[str, str]]] = {}
    for row in sorted(rows):
        number = int(np.searchsorted(starts, row, side="right")) - 1
        lists.setdefault(number, []).append(dict(zip(DROPS_SCHEMA.names, rows[row], strict=True)))
    for number, lines in lists.items():
        table = pa.Table.from_pylist(lines, schema=DROPS_SCHEMA)
        write_atomically(folder / shards[number].path, partial(pq.write_table, table))
    if folder.exists():
        keep_only(folder, [shards[number].path for number in lists])
    return {number: file_sha256(folder / shards[number].path) for number in lists}


def compared_with(card: Card) -> list[str]:
    """The sets that a card's rules look at."""
    rules = [rule for rule in card.filters if rule.rule == "duplicates"]
    return sorted({name for rule in rules for name in parse(DuplicateOptions, rule.options, card.name).against})


def check_order(card: Card, others: Iterable[Card]) -> None:
    """Raises ConfigError when two sets would each leave what they share to the other."""
    for other in others:
        if card.name in compared_with(other):
            raise ConfigError(
                f"cards {card.name} and {other.name}: each is `against` the other; one has to keep the rows"
            )
