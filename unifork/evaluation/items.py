"""Items of a benchmark: official files go in, a table of questions, truths and images comes out.

The table is a folder of shards with a manifest, like all data here. A shard is what a model is given at once, or in
parts of a fixed size, so that answers do not depend on where a run was killed; it holds the images of its items, each
once, measured when they are brought in: nothing else is needed to answer, and what is missing or damaged is found
before any network runs.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from unifork.config import EvalCard, fingerprint
from unifork.errors import DataError
from unifork.evaluation.names import ABSENT
from unifork.images import measure
from unifork.shards.job import read_table, table_of, write_shard
from unifork.shards.manifest import Manifest, Shard, read_manifest, write_manifest
from unifork.shards.schema import columns_of
from unifork.shards.task import ShardTask

ITEMS_VERSION = 2
"""Raise when the same files would give other items."""
AT_ONCE = 64
"""Items of a shard: what a model is given at once at most."""
NAMED = 5
"""Faults that a message names; the others are counted."""
TEXTS = ("id", "question", "cluster", "split", "image")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in (*TEXTS, "truth", "about", "sha256")),
        *(("number", pa.int64()), ("chance", pa.float64()), ("bytes", pa.binary())),
    ]
)
"""`number` is the place in the official order; `truth` and `about` are JSON; `bytes` of an image that the shard has had
already, by its `sha256`, are null."""


@dataclass(frozen=True)
class Item:
    """One question about an image, or one text to generate an image for."""

    id: str
    question: str
    truth: Any
    """Plain data that the suite's rules read; None where it is not public."""
    cluster: str
    """What it shares with others, such as an image: errors count clusters, not items."""
    split: str = "all"
    image: str = ""
    """Name of its image in the archive; nothing for an image to be generated."""
    chance: float = 0.0
    """How right an answer is, on average, of a model that ignores its input."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """More plain data, for the suite's scores; `question_id` is the official id, which need not be a key."""


def faults(what: str, found: Sequence[str]) -> str:
    """The first faults of a kind, and how many there are."""
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"{len(found)} {what}: {', '.join(found[:NAMED])}{more}"


def selected(card: EvalCard, items: Sequence[Item]) -> list[Item]:
    """The items that a card has answered. Raises DataError where ids repeat or their number is not the card's."""
    if again := [name for name, count in Counter(item.id for item in items).items() if count > 1]:
        raise DataError(f"{card.name}: {faults('ids that come again', again)}")
    chosen = [item for item in items if not card.items.splits or item.split in card.items.splits]
    if not chosen or card.items.rows not in (None, len(chosen)):
        wanted, have = card.items.rows or "some", card.items.revision or "no revision named"
        raise DataError(f"{card.name}: {len(chosen)} items; its card wants {wanted} ({have}): these are other files")
    return chosen


def identity(items: Sequence[Item]) -> str:
    """A hash of what the items ask and what is right."""
    return fingerprint([[item.id, item.question, item.truth, item.cluster, item.split] for item in items])


def write_items(
    card: EvalCard, items: Sequence[Item], image: Callable[[str], bytes], folder: Path, lineage: dict[str, Any]
) -> Manifest:
    """The table of some items. image: the bytes of an image by its name.

    Raises DataError that counts and names the images that are missing or damaged; then there is no table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    wrong: dict[str, str] = {}
    for index, part in enumerate(given_together(items)):
        hashes: dict[str, str | None] = {"": None}
        rows: list[dict[str, Any]] = []
        for number, item in part:
            row = {"number": number, **{name: getattr(item, name) for name in (*TEXTS, "chance")}}
            row |= {"truth": json.dumps(item.truth), "about": json.dumps(item.about)}
            if item.image not in hashes:
                try:
                    measure(data := image(item.image))
                except DataError as error:
                    wrong[item.image] = f"{item.image}: {error}"
                    continue
                digest = sha256(data).hexdigest()
                row["bytes"] = None if digest in hashes.values() else data
                hashes[item.image] = digest
            rows.append(row | {"sha256": hashes[item.image]})
        task = ShardTask().placed(None, folder / f"part-{index:05d}.parquet", None, "")
        if not wrong and (shard := write_shard(task, table_of(rows, SCHEMA), {}).shard):
            shards.append(shard)
    if wrong:
        raise DataError(f"{card.name}: {faults('images cannot be used', list(wrong.values()))}")
    lineage = {"items": identity(items), **lineage}
    columns = columns_of(SCHEMA)
    manifest = Manifest(kind="items", dataset=card.name, columns=columns, shards=tuple(shards), lineage=lineage)
    write_manifest(folder, manifest)
    return manifest


def given_together(items: Sequence[Item]) -> Iterator[list[tuple[int, Item]]]:
    """Items with their numbers, shard by shard: all about one image side by side, images with like questions too.

    Items without images keep their order: what is drawn for one depends on its number.
    """
    about: dict[str, list[tuple[int, Item]]] = {}
    for number, item in enumerate(items):
        about.setdefault(item.image or str(number // AT_ONCE), []).append((number, item))
    longest = {name: max(len(item.question) for _, item in group) for name, group in about.items() if group[0][1].image}
    part: list[tuple[int, Item]] = []
    for name in sorted(about, key=lambda name: longest.get(name, 0)):
        group = about[name]
        if part and len(part) + len(group) > AT_ONCE:
            yield part
            part = []
        part += group
        while len(part) > AT_ONCE:
            yield part[:AT_ONCE]
            part = part[AT_ONCE:]
    if part:
        yield part


def item_of(row: Mapping[str, Any]) -> Item:
    """An item from a row of its table."""
    plain = {name: json.loads(row[name]) for name in ("truth", "about")}
    return Item(**{name: row[name] for name in (*TEXTS, "chance")}, **plain)


def questions(folder: Path) -> list[str]:
    """The texts of a table, in their official order. Raises DataError where the benchmark is not here."""
    if absent := read_manifest(folder).lineage.get(ABSENT):
        raise DataError(f"{folder}: not here: {absent}")
    return [item.question for item in read_items(folder)]


def read_items(folder: Path) -> list[Item]:
    """The items of a table in their official order. Raises DataError."""
    columns = [name for name in SCHEMA.names if name != "bytes"]
    rows = [row for shard in read_manifest(folder).shards for row in read_table(folder, shard, columns).to_pylist()]
    return [item_of(row) for row in sorted(rows, key=lambda row: row["number"])]
