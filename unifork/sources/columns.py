"""The columns of lists of URLs under one name, however a release spells them.

The same quantity is `URL` in LAION's releases, `url` in COYO and in anything that img2dataset wrote, and
`photo_image_url` at Unsplash. Names are compared without case; where several columns say the same, the
first of the table that is filled in a row wins. Types are whatever went through Spark and pandas: sides as
floats, NaN for nothing, numbers as text; what is no number or text of its column becomes None.

Sources: laion-prepro and img2dataset's dataset_examples (LAION), the READMEs of coyo-dataset and of
unsplash/datasets. The columns of Re-LAION were not seen; they are expected to be LAION's.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from unifork.errors import ConfigError


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return str(value).strip() or None


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # a 64-bit hash does not survive a float
    if isinstance(value, str) and value.strip().lstrip("+-").isdigit():
        return int(value)
    number = _number(value)
    return None if number is None else int(number)


@dataclass(frozen=True)
class Column:
    """One quantity: how it is read, and the lower-case names it goes by, best first."""

    read: Callable[[Any], Any]
    spellings: tuple[str, ...]


COLUMNS: dict[str, Column] = {
    "url": Column(_text, ("url", "photo_image_url", "image_url")),
    "caption": Column(
        _text, ("text", "caption", "photo_description", "top_caption", "eng text", "ai_description", "alt_text")
    ),
    # img2dataset's width and height are those of the stored picture
    "width": Column(_whole, ("original_width", "width", "photo_width")),
    "height": Column(_whole, ("original_height", "height", "photo_height")),
    "similarity": Column(_number, ("similarity", "clip_similarity_vitb32", "clip_similarity_vitl14")),
    "aesthetic": Column(_number, ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2")),
    "pwatermark": Column(_number, ("pwatermark", "watermark_score")),
    "punsafe": Column(_number, ("punsafe", "nsfw_score_opennsfw2", "nsfw_score_gantman")),
    "nsfw": Column(_text, ("nsfw",)),  # a word in LAION-400M: UNLIKELY, UNSURE, NSFW
    "license": Column(_text, ("license", "licence")),
    "language": Column(_text, ("language", "lang")),
    "hash": Column(_whole, ("hash",)),  # murmur3 of url + text: the join key of LAION's tag files
    "md5": Column(_text, ("md5",)),
    "sha256": Column(_text, ("sha256",)),
    "phash": Column(_text, ("image_phash",)),
    "id": Column(_text, ("sample_id", "id", "photo_id")),
}
"""Canonical name -> column. Everything else in a list has no meaning here and is left out."""

Mapped = dict[str, list[str]]
"""Canonical name -> the columns of a list that hold it, best first."""


def mapped(names: Iterable[str], place: str, named: Mapping[str, str] | None = None) -> Mapped:
    """Which columns of a list say what; `named` ones (ours -> theirs) go by the name they are given.

    Raises ConfigError when none of them holds URLs, or when a named one is not there.
    """
    here: dict[str, list[str]] = {}
    for name in names:
        here.setdefault(name.strip().lower(), []).append(name)
    found = {
        canonical: columns
        for canonical, column in COLUMNS.items()
        if (columns := [name for spelling in column.spellings for name in here.get(spelling, [])])
    }
    for canonical, name in (named or {}).items():
        if name.lower() not in here:
            shown = ", ".join(sorted(name for same in here.values() for name in same))
            raise ConfigError(f"{place}: no column {name!r} for {canonical!r}; found: {shown}")
        found[canonical] = here[name.lower()]
    if "url" not in found:
        shown = ", ".join(sorted(name for same in here.values() for name in same))
        raise ConfigError(f"{place}: no column of URLs; known: {', '.join(COLUMNS['url'].spellings)}; found: {shown}")
    return found


def canonical(row: Mapping[str, Any], columns: Mapped) -> dict[str, Any]:
    """A row of a list under the canonical names; None where nothing usable is said."""
    made: dict[str, Any] = {}
    for name, spellings in columns.items():
        read = COLUMNS[name].read if name in COLUMNS else _text
        values = (read(row.get(spelling)) for spelling in spellings)
        made[name] = next((value for value in values if value is not None), None)
    return made
