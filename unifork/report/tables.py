"""What a page is built of: plain values go in; tables, which a phone shows as cards, and numbers in words come out.

And the page itself, from a template.
"""

import csv
import io
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2


class Table(NamedTuple):
    """Rows of cells, the first of each names it. A cell that is None is not there yet; a list stands in one cell."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def table(label: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows by the titles of their columns; what a row has no cell for stays empty."""
    columns = list(dict.fromkeys(title for row in rows for title in row))
    return Table(label, columns, [[row.get(title, "") for title in columns] for row in rows])


class Judged(NamedTuple):
    """A text and whether it is right."""

    good: bool
    text: str | None
    """None where there is no text to show, as beside an image that is right."""


class Measured(NamedTuple):
    """A score in words, and its place and that of chance between worst (0) and best (1), where they have one."""

    text: str
    place: float | None
    chance: float | None


class Differs(NamedTuple):
    """A difference with its 95 % interval in words, and its p."""

    text: str
    p: float


def rendered(template: str, **values: Any) -> str:
    """A template of this folder with values in it, which are escaped in HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": count, "duration": duration, "form": form, "rate": rate}
    return environment.get_template(template).render(**values)


def data_uri(kind: str, data: bytes) -> str:
    """Bytes as an address that holds them."""
    return f"data:{kind};base64,{b64encode(data).decode()}"


def csv_of(rows: Iterable[Sequence[Any]]) -> bytes:
    """Rows as a file."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue().encode()


def count(number: int) -> str:
    """A number of things: exact up to a million, with thin spaces; millions above."""
    return f"{number:,}".replace(",", "\u202f") if number < 1_000_000 else f"{number / 1e6:.2f}\u202fM"


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "not measured"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def real(number: float) -> str:
    """A score: three digits after the point, one for large ones."""
    return f"{number:.3f}" if abs(number) < 10 else f"{number:.1f}"


def form(value: float | None, pattern: str) -> str:
    """A value as `str.format` writes it; a dash where there is none."""
    return "-" if value is None else pattern.format(value)


def rate(row: Mapping[str, Any], name: str) -> str:
    """A mean of a row with its standard error."""
    return f"{row[name]:.3f} ± {row[f'{name}_standard_error']:.3f}"


def words(name: str) -> str:
    """A name in a file as people write it."""
    return name.replace("_", " ")
