"""Where pictures come from. A source plans its shards and yields the rows and faults of one of them.

Adding a kind of source is one entry in SOURCES; adding a data set with a known kind is one card.
Rows carry `key, image, width, height, url, sha256`, the text columns of the card, and `license` where it
is not the card's.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any, NoReturn

from unifork.config import Card
from unifork.errors import ConfigError, DataError, unknown
from unifork.shapes import world_rows
from unifork.sources import emoji, imagenet, listed, pairs, url_lists
from unifork.sources.base import Fault, Options, Row, Slice, Source, Task

__all__ = ["SOURCES", "Fault", "Row", "Source", "Task", "plan", "rows_of"]

ACCESS = "access"
"""Option of every kind: how a person gets the files. Shown when they are missing, no part of a fingerprint."""


def plan(kind: str, options: Options, rows: int | None, shard_rows: int, seed: int, place: str) -> list[Task]:
    """The shards of a source: slices of at most `shard_rows` rows, `rows` in all.

    Raises ConfigError for an unknown kind, for files that are not there, or when an endless source is asked
    for all its rows.
    """
    where = f". Where it is: {options[ACCESS]}" if ACCESS in options else ""
    if kind not in SOURCES:
        raise ConfigError(f"{unknown('kind of source', kind, SOURCES, place)}{where}")
    source, known = SOURCES[kind], {name: value for name, value in options.items() if name != ACCESS}
    if source.endless and rows is None:
        raise ConfigError(f"{place}: a {kind!r} source is endless; say how many rows to take")
    tasks: list[Task] = []
    taken = 0
    try:
        for one in source.slices(known, shard_rows):
            stop = one["stop"] if rows is None else min(one["stop"], one["start"] + rows - taken)
            tasks.append({"kind": kind, "options": known, "seed": seed, **one, "stop": stop})
            taken += stop - one["start"]
            if taken == rows:
                break
    except (ConfigError, DataError) as error:
        raise type(error)(f"{place}: {error}{where}") from None
    return tasks


def source_of(card: Card) -> tuple[Source, Options]:
    """The kind of a card's source, and its options. Raises ConfigError."""
    if card.source.kind not in SOURCES:
        raise unknown("kind of source", card.source.kind, SOURCES, f"datasets/{card.name}.yaml: source.kind")
    return SOURCES[card.source.kind], card.source.options


def rows_of(task: Task) -> Iterator[Row | Fault]:
    """The rows of one planned shard."""
    return SOURCES[task["kind"]].rows(task)


# ------------------------------------------------------------------------------------------ shapes


def _shapes_slices(options: Options, shard_rows: int) -> Iterator[Slice]:  # noqa: ARG001 - they do not change the plan
    return ({"start": start, "stop": start + shard_rows} for start in count(0, shard_rows))


def _shapes_rows(task: Task) -> Iterator[Row]:
    return world_rows(task["seed"], task["start"], task["stop"], **task["options"])


# ---------------------------------------------------------------------------------------- external


def _brought(*_: Any) -> NoReturn:
    raise ConfigError(
        "an 'external' set is not downloaded by this version. "
        "Name a source that can be read in the card, or write image-text shards and their manifest yourself"
    )


SOURCES: dict[str, Source] = {
    "external": Source(_brought, _brought),
    "shapes": Source(_shapes_slices, _shapes_rows, endless=True),
    "emoji": Source(emoji.slices, emoji.rows),
    "pairs": Source(pairs.slices, pairs.rows, ("files", "captions")),
    "imagenet": Source(imagenet.slices, imagenet.rows, ("path", "prompts", "synsets")),
    "listed": Source(listed.slices, listed.rows, ("lists", "images")),
    "listed_meta": Source(listed.meta_slices, listed.meta_rows, ("meta", "root")),
    "url_list": Source(url_lists.slices, url_lists.rows, ("files",)),
}
