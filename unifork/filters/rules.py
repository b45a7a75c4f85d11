"""Rules that keep or drop a row, with a reason. Pure functions of one row; the card chooses them.

A picture that cannot be decoded is dropped by every hop, whatever the card says, and goes to the
quarantine with what the decoder said.
"""

import io
import math
import unicodedata
from collections.abc import Callable
from functools import partial
from typing import Any

from PIL import Image

from unifork.config import Card
from unifork.errors import unknown
from unifork.filters.takedown import listing
from unifork.shards.schema import CONVERSATIONS, text_columns

Row = dict[str, Any]
MAX_PIXELS = 64_000_000
"""Largest picture that is decoded; the header is read first, so a bomb costs nothing."""


def unreadable(row: Row) -> str | None:
    """Why a picture cannot be decoded, in the decoder's words; None when it can."""
    data = row["image"]
    if not data:
        return "empty"
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return f"{picture.width}x{picture.height} pixels, more than {MAX_PIXELS}"
            picture.load()
    except Exception as error:  # any decoder may raise anything on hostile bytes
        return f"{type(error).__name__}: {error}"
    return None


def min_side(row: Row, pixels: int) -> bool:
    """Keep pictures whose shorter side has at least `pixels`."""
    return bool(min(row["width"], row["height"]) >= pixels)


def max_aspect(row: Row, ratio: float) -> bool:
    """Keep pictures whose sides differ by at most `ratio`."""
    long, short = max(row["width"], row["height"]), min(row["width"], row["height"])
    return bool(long <= ratio * short)


def max_bytes(row: Row, most: int) -> bool:
    """Keep pictures of at most `most` bytes as received."""
    return len(row["image"]) <= most


def max_pixels(row: Row, most: int) -> bool:
    """Keep pictures of at most `most` pixels."""
    return bool(row["width"] * row["height"] <= most)


def text_length(row: Row, column: str, least: int, most: int) -> bool:
    """Keep rows whose text has between `least` and `most` characters."""
    return least <= len(row.get(column) or "") <= most


def no_chinese(row: Row, column: str) -> bool:
    """Keep rows without Chinese characters (the paper drops such captions)."""
    return not any("\u4e00" <= char <= "\u9fff" for char in row.get(column) or "")


def latin_letters(row: Row, column: str, least: float) -> bool:
    """Keep rows of whose letters at least the share `least` is Latin; a text without letters is kept."""
    letters = [char for char in row.get(column) or "" if char.isalpha()]
    latin = sum(unicodedata.name(char, "").startswith(("LATIN", "FULLWIDTH LATIN")) for char in letters)
    return latin >= least * len(letters)


def score(
    row: Row, column: str, least: float = -math.inf, most: float = math.inf, *, keep_missing: bool = False
) -> bool:
    """Keep rows whose column (similarity, pwatermark, ...) is a number from `least` to `most`.

    The column is one of those the card keeps. keep_missing: what is no number there is kept.
    """
    try:
        value = float(row.get(column) or "nan")
    except ValueError:
        value = math.nan
    return keep_missing if math.isnan(value) else least <= value <= most


def not_withdrawn(row: Row, file: str) -> bool:
    """Keep rows that a list of withdrawn URLs, hosts, keys and hashes does not name."""
    return listing(file).match(row[DATASET], row) is None


def _no_twin(rule: str, row: Row, **_: Any) -> bool:
    """Keep rows that have no earlier twin (`unifork.filters.duplicates` finds them)."""
    return rule not in row.get(TWINS, {})


DATASET, TWINS = "dataset", "twins"
"""What `judge` and the filter lay beside a row's columns: its set, and rule -> earlier twin."""
TAKEDOWN = "takedown"
TWIN_RULES = ("duplicates", "near_benchmark")
"""Rules that look at other rows."""
SCORES = ("similarity", "aesthetic", "pwatermark", "punsafe")
"""Columns of `sources.columns` that have a rule of their own name."""

RULES: dict[str, Callable[..., bool]] = {
    "min_side": min_side,
    "max_aspect": max_aspect,
    "max_bytes": max_bytes,
    "max_pixels": max_pixels,
    "text_length": text_length,
    "no_chinese": no_chinese,
    "latin_letters": latin_letters,
    "score": score,
    TAKEDOWN: not_withdrawn,
    **{name: partial(score, column=name) for name in SCORES},
    **{name: partial(_no_twin, name) for name in TWIN_RULES},
}


def check_rules(card: Card) -> None:
    """Raise ConfigError for a rule that a card cannot name."""
    for number, entry in enumerate(card.filters):
        if entry.rule not in RULES:
            raise unknown("filter rule", entry.rule, RULES, f"datasets/{card.name}.yaml: filters[{number}]")


def judge(row: Row, card: Card) -> tuple[str, str] | None:
    """(reason, detail) why a row is dropped, None when it is kept.

    Raises ConfigError when the card names an unknown rule.
    """
    problem = unreadable(row)
    if problem:
        return "unreadable", problem
    if not any(row.get(name) for name in text_columns(card)):
        return "no_text", f"none of {', '.join(text_columns(card))} is filled"
    for number, entry in enumerate(card.filters):
        if entry.rule not in RULES:
            raise unknown("filter rule", entry.rule, RULES, f"{card.name}: filters[{number}]")
        if not RULES[entry.rule]({**row, DATASET: card.name}, **entry.options):
            if entry.rule == TAKEDOWN:
                return entry.rule, f"named in {entry.options['file']}"  # nothing else of it is kept
            shown = {name: row[name] for name in row if name not in ("image", CONVERSATIONS)}
            return entry.rule, f"{entry.options} on {shown}"
    return None
