"""Rules that keep or drop a row, with a reason. Pure functions of one row and typed options; the card chooses them.

A rule is a function under `rule(OPTIONS)` and one entry in `RULES`; a card may also name `MODULE:OBJECT`, which is
how anybody's code takes part. A row has its columns, without the image, and what the image measures
(`unifork.filters.measure`). One that cannot be decoded is dropped whatever the card says, with what the decoder said.
"""

import json
import math
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveInt

from unifork.config import Card, StrictModel, parse
from unifork.config.base import Fraction01
from unifork.config.card import FilterRule
from unifork.errors import ConfigError, Rejected, tried, unknown
from unifork.registry import Registry
from unifork.shards.manifest import file_sha256
from unifork.shards.schema import CONVERSATIONS, FIXED_COLUMNS, numbered, text_columns
from unifork.sources import located, source_of
from unifork.vocabulary import MORE_IMAGES

Row = dict[str, Any]
Options = TypeVar("Options", bound=StrictModel)
Kind = Literal["sha256", "pair", "phash"]
"""What two rows may have in common: the bytes of their image, URL and text, or what the image shows."""
Distance = Annotated[int, Field(ge=0, le=7)]
"""Bits of 64 in which two difference hashes may differ."""
DATASET, DUPLICATES = "dataset", "duplicates"
"""What `judge` and the filter lay beside a row's columns: its set, and rule -> earlier duplicate."""
TAKEDOWN = "takedown"
DUPLICATE_RULES = ("duplicates", "near_benchmark")
"""Rules that look at other rows."""
SCORES = ("similarity", "aesthetic", "pwatermark", "punsafe")
"""Columns of `sources.url_lists` that have a rule of their own name."""


@dataclass(frozen=True)
class Rule(Generic[Options]):
    """A decision about one row."""

    options: type[Options]
    """What `options` of a card's filter may say. A key `column` must name a column of the card."""
    keeps: Callable[[Row, Options], bool]
    """Whether a row stays."""
    paths: tuple[str, ...] = ()
    """Options that name files or folders."""
    of_images: bool = False
    """It is asked for each image of a row, and keeps a row without one."""
    version: int = 0
    """Raise when the same options would decide otherwise; part of the fingerprint."""


def rule(
    options: type[Options], *paths: str, of_images: bool = False, version: int = 0
) -> Callable[[Callable[[Row, Options], bool]], Rule[Options]]:
    """Make a function of a row and options a rule."""
    return lambda keeps: Rule(options, keeps, paths, of_images, version)


RULES: Registry[Rule[Any]] = Registry(
    "filter rule",
    Rule,
    {
        name: f"{__name__}:{name}"
        for name in (
            "min_side", "max_aspect", "max_bytes", "max_pixels", "text_length", "no_chinese", "latin_letters", "score",
            TAKEDOWN, *SCORES, *DUPLICATE_RULES,
        )
    },
)  # fmt: skip


@lru_cache(maxsize=16)
def rules_of(card: Card) -> tuple[tuple[Rule[Any], StrictModel], ...]:
    """The rules of a card with their options, in order; no file is touched. Raises ConfigError naming the key."""
    found = []
    place, columns = f"card {card.name}", {*FIXED_COLUMNS, *text_columns(card), *card.columns}
    for number, entry in enumerate(card.filters):
        key = f"filters[{number}]"
        chosen = RULES.find(entry.rule, f"{place}: {key}.rule")
        options = parse(chosen.options, entry.options, place, f"{key}.options")
        column = getattr(options, "column", entry.rule if entry.rule in SCORES else None)
        if column is not None and column not in columns:
            raise unknown("column", column, columns, f"{place}: {key} ({entry.rule})")
        found.append((chosen, options))
    return tuple(found)


def check_card(card: Card) -> None:
    """Raise ConfigError for a source or rule that is unknown or has wrong options, before anything runs."""
    source_of(card)
    rules_of(card)


def judge(row: Row, card: Card) -> tuple[str, str] | None:
    """(reason, detail) why a measured row is dropped, None when it is kept.

    Raises ConfigError when the card names an unknown rule. What a rule raises otherwise costs its row.
    """
    if row["problem"]:
        return row["problem"], row["problem_detail"]
    if not any(row.get(name) for name in text_columns(card)):
        return "no_text", f"none of {', '.join(text_columns(card))} is filled"
    more = row.get(MORE_IMAGES) or ()
    images = [] if row["bytes"] is None else [{**row, **image, MORE_IMAGES: None} for image in (row, *more)]
    for entry, rule_of_it in zip(card.filters, rules_of(card), strict=True):
        of_images = rule_of_it[0].of_images
        for number, asked_row in enumerate(images if of_images else [row], 1):
            if why := _dropped(asked_row, card, entry, *rule_of_it):
                return why[0], numbered(why[1], number, len(images)) if of_images else why[1]
    return None


def _dropped(
    row: Row, card: Card, entry: FilterRule, chosen: Rule[Any], options: StrictModel
) -> tuple[str, str] | None:
    """(reason, detail) where a rule does not keep a row."""
    keeps = tried(chosen.keeps, {**row, DATASET: card.name}, options)
    if isinstance(keeps, Rejected):  # by a rule that met what its author did not think of
        return "unexpected", f"{entry.rule}: {keeps}"
    if keeps:
        return None
    if entry.rule == TAKEDOWN:
        return entry.rule, f"named in {entry.options['file']}"  # nothing else of it is kept
    shown = {name: row[name] for name in row if row[name] is not None and name != CONVERSATIONS}
    return entry.rule, f"{entry.options} on {shown}"


# ----------------------------------------------------------------------------------------- images


class Side(StrictModel):
    """Options of `min_side`."""

    pixels: PositiveInt


class Aspect(StrictModel):
    """Options of `max_aspect`."""

    ratio: Annotated[float, Field(ge=1.0)]


class Most(StrictModel):
    """Options of `max_bytes` and `max_pixels`."""

    most: PositiveInt


@rule(Side, of_images=True)
def min_side(row: Row, options: Side) -> bool:
    """Keep images whose shorter side has at least `pixels`."""
    return bool(min(row["width"], row["height"]) >= options.pixels)


@rule(Aspect, of_images=True)
def max_aspect(row: Row, options: Aspect) -> bool:
    """Keep images whose sides differ by at most `ratio`."""
    long, short = max(row["width"], row["height"]), min(row["width"], row["height"])
    return bool(long <= options.ratio * short)


@rule(Most, of_images=True)
def max_bytes(row: Row, options: Most) -> bool:
    """Keep images of at most `most` bytes as received."""
    return bool(row["bytes"] <= options.most)


@rule(Most, of_images=True)
def max_pixels(row: Row, options: Most) -> bool:
    """Keep images of at most `most` pixels."""
    return bool(row["width"] * row["height"] <= options.most)


# ------------------------------------------------------------------------------- texts and scores


class Text(StrictModel):
    """Options of `no_chinese`."""

    column: str


class Length(Text):
    """Options of `text_length`, in characters."""

    least: NonNegativeInt
    most: NonNegativeInt


class Share(Text):
    """Options of `latin_letters`."""

    least: Fraction01


class Score(StrictModel):
    """Options of `similarity`, `aesthetic`, `pwatermark` and `punsafe`."""

    least: float = -math.inf
    most: float = math.inf
    keep_missing: bool = False
    """Keep what is no number there."""


class ScoreOf(Score):
    """Options of `score`."""

    column: str


@rule(Length)
def text_length(row: Row, options: Length) -> bool:
    """Keep rows whose text has between `least` and `most` characters."""
    return options.least <= len(row.get(options.column) or "") <= options.most


@rule(Text)
def no_chinese(row: Row, options: Text) -> bool:
    """Keep rows without Chinese characters (the paper drops such captions)."""
    return not any("\u4e00" <= char <= "\u9fff" for char in row.get(options.column) or "")


@rule(Share)
def latin_letters(row: Row, options: Share) -> bool:
    """Keep rows of whose letters at least the share `least` is Latin; a text without letters is kept."""
    letters = [char for char in row.get(options.column) or "" if char.isalpha()]
    latin = sum(unicodedata.name(char, "").startswith(("LATIN", "FULLWIDTH LATIN")) for char in letters)
    return latin >= options.least * len(letters)


@rule(ScoreOf)
def score(row: Row, options: ScoreOf) -> bool:
    """Keep rows whose column, one of those the card keeps, is a number from `least` to `most`."""
    return _within(row, options.column, options)


def _within(row: Row, column: str, options: Score) -> bool:
    try:
        value = float(row.get(column) or "nan")
    except ValueError:
        value = math.nan
    return options.keep_missing if math.isnan(value) else options.least <= value <= options.most


def _score_named(column: str) -> Rule[Score]:
    return Rule(Score, lambda row, options: _within(row, column, options), of_images=True)


similarity, aesthetic, pwatermark, punsafe = map(_score_named, SCORES)

# ------------------------------------------------------------------------- lists and other rows


KINDS = ("url", "host", "sha256", "key")
"""Kinds of entries of a list."""
Entry = tuple[str, str]
"""Kind and value."""


class Listing:
    """A list of what must not be used, held in memory as a set of strings.

    A text file, one entry per line: `url ADDRESS`, `host NAME` (and every host below it), `sha256 HEX` (of the image
    as received), `key SET/KEY`. `#` begins a comment. A value in double quotes is read as JSON, for line breaks in it
    and blanks at its ends.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError naming the first line that is no entry."""
        self.entries: set[Entry] = set()
        number = 0
        try:
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
                self._add(line, f"{path}:{number}")
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: UTF-8, with quoted values in JSON, is expected: {error}") from None

    def _add(self, line: str, place: str) -> None:
        words = line.split(maxsplit=1)
        if not words or words[0].startswith("#"):
            return
        if words[0] not in KINDS or len(words) != 2:
            raise ConfigError(f"{place}: {line!r} is no entry; {' | '.join(KINDS)}, a blank, and the value")
        value = words[1].strip()
        value = str(json.loads(value)) if value.startswith('"') else value
        self.entries.add((words[0], value if words[0] in ("url", "key") else value.lower()))

    def match(self, dataset: str, row: dict[str, Any]) -> list[Entry]:
        """The entries that name a row with `key`, `url` and `sha256`."""
        url = row.get("url") or ""
        hashes = [image.get("sha256") or "" for image in (row, *(row.get(MORE_IMAGES) or ()))]
        candidates = [("key", f"{dataset}/{row['key']}"), ("url", url), *(("sha256", text.lower()) for text in hashes)]
        return [entry for entry in [*candidates, *_hosts(url)] if entry in self.entries]


def entry_line(entry: Entry) -> str:
    """An entry as a list has it, in one line that shows all its letters."""
    kind, value = entry
    plain = value.isprintable() and value == value.strip() and not value.startswith('"')
    return f"{kind} {value if plain and value else json.dumps(value)}"


def _hosts(url: str) -> list[Entry]:
    """`a.b.org` as the hosts a.b.org, b.org and org."""
    try:
        parts = (urlsplit(url).hostname or "").lower().split(".")
    except ValueError:
        return []
    return [("host", ".".join(parts[number:])) for number in range(len(parts))]


def listing(text: str) -> Listing:
    """The list that a card names, read once while it does not change. Raises ConfigError."""
    path = located(text)
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, _changed: int, _bytes: int) -> Listing:
    return Listing(path)


def list_hashes(files: Iterable[str]) -> dict[str, str]:
    """Name -> hash of its content, for the fingerprint of what lists decide."""
    return {text: file_sha256(located(text)) for text in files}


class TakedownOptions(StrictModel):
    """Options of `takedown`."""

    file: str
    """The list; its content is part of what decides the rows."""


class DuplicateOptions(StrictModel):
    """Options of `duplicates`."""

    by: tuple[Kind, ...] = ("sha256", "pair")
    """Same bytes, same URL and text, same look."""
    distance: Distance = 0
    """For `phash`."""
    against: tuple[str, ...] = ()
    """Sets that keep what they share with this one."""


class BenchmarkOptions(StrictModel):
    """Options of `near_benchmark`."""

    files: str
    """Folder or tar with the benchmark's images."""
    distance: Distance = 3


@rule(TakedownOptions, "file")
def takedown(row: Row, options: TakedownOptions) -> bool:
    """Keep rows that a list of withdrawn URLs, hosts, keys and hashes does not name."""
    return not listing(options.file).match(row[DATASET], row)


@rule(DuplicateOptions)
def duplicates(row: Row, _options: DuplicateOptions) -> bool:
    """Keep rows that are no duplicate of an earlier one (`unifork.filters.duplicates` finds them)."""
    return "duplicates" not in row.get(DUPLICATES, {})


@rule(BenchmarkOptions, "files")
def near_benchmark(row: Row, _options: BenchmarkOptions) -> bool:
    """Keep rows that look like no image of a benchmark (`unifork.filters.duplicates` finds them)."""
    return "near_benchmark" not in row.get(DUPLICATES, {})
