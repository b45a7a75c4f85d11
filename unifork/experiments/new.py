"""A first card and experiment for somebody's own files, by what the first rows hold.

In: a name and a file, folder or glob. Out: the texts of `datasets/NAME.yaml` and `experiments/NAME.yaml`, and the rows
that they were made by. What people have to decide or to correct stands in the two files.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import yaml

from unifork.config import Card, parse
from unifork.errors import ConfigError, cause, one_of
from unifork.experiments import HERE
from unifork.experiments.followed import followed
from unifork.experiments.inheritance import inherited
from unifork.shards.schema import CONVERSATIONS
from unifork.sources import Materialize, Row, RowError, plan, source_of
from unifork.sources.archives import ARCHIVES, is_image, picked
from unifork.sources.files import TABLES, files_of
from unifork.sources.list_files import LISTS
from unifork.sources.table import first_entries

EXTENDED = ("demo", "micro")
"""Experiments that a new one may extend; the templates know their stages."""
LOOKED_AT, PROMPTS, PROMPT_BYTES = 20, 4, 200
"""Entries that are looked at, and texts of them that a model is to draw while it learns: how many, how long."""
SHARD_ROWS = 500
TEXTS = ("caption", "text", "description", "prompt", "title", "sentence", "label", "class")
"""Columns that are taken for texts first, by their names."""


@dataclass(frozen=True)
class Proposal:
    """What `unifork new` would write."""

    card: str
    experiment: str
    rows: list[Row]
    """The first of them that are kept."""
    left_out: list[RowError]
    """The first of them that are not."""
    total: int
    """How many entries there are."""


def propose(name: str, files: str, extends: str, image: str | None = None, text: str | None = None) -> Proposal:
    """The two files for some others. image, text: columns of a table that hold them; None looks for some.

    Raises ConfigError where no row can be made of what is there, with the reason for the first.
    """
    if not name.isidentifier() or yaml.safe_load(name) != name:  # `on` is true there
        raise ConfigError(f"{name!r}: letters, digits and _ are expected; files and stages are called so")
    one_of("experiment", extends, EXTENDED, "--like")
    source = _source(files, image, text)
    column = next(iter(source["options"].get("texts", {"caption": "caption"})))
    fields, place = {"name": name, "source": source, "text": column, "extends": extends}, f"datasets/{name}.yaml"
    card = parse(Card, yaml.safe_load(_written("new_card.yaml.jinja", **fields, held_out=0.1)), place)
    followed(card, place)
    total = sum(task.rows for task in plan(card, None, SHARD_ROWS, 0))
    # images of the web are not there yet
    looked_at = card.model_copy(update={"text_only": "keep"}) if source_of(card)[1].web else card
    table, left_out = Materialize(looked_at).materialized(plan(card, LOOKED_AT, LOOKED_AT, 0)[0])
    rows = table.to_pylist()
    for error in left_out if not rows else ():
        raise ConfigError(f"{files}: the first entries are no rows: {error.reason}: {error.detail}")
    texts = dict.fromkeys(
        row["caption"] for row in rows if 0 < len((row.get("caption") or "").encode()) <= PROMPT_BYTES
    )
    parent = inherited(extends, HERE.experiments)
    experiment = _written(
        "new_experiment.yaml.jinja", **fields, rows=total, shard_rows=SHARD_ROWS, prompts=list(texts)[:PROMPTS],
        **{key: list(parent[key]) for key in ("datasets", "stages", "benchmarks")},
    )  # fmt: skip
    written = _written("new_card.yaml.jinja", **fields, held_out=0.1 if total < 4 * SHARD_ROWS else 0.02)
    return Proposal(written, experiment, rows, left_out, total)


def _written(template: str, **fields: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["yaml"] = _yaml
    return environment.get_template(template).render(**fields)


def _yaml(value: Any) -> str:
    """A value as YAML takes it anywhere, whatever letters it has."""
    how: dict[str, Any] = {"allow_unicode": True, "default_flow_style": True, "default_style": '"', "width": math.inf}
    return str(yaml.safe_dump([value], **how)).strip()[1:-1]


def _source(files: str, image: str | None, text: str | None) -> dict[str, Any]:
    """A table where there is one, else images and texts of the same names."""
    endings = (*TABLES, *LISTS)
    pairs = {"kind": "pairs", "options": {"files": files}}
    try:  # not .json, which may lie beside every image
        tables = files_of(files, [ending for ending in endings if ending != ".json"])
    except ConfigError:
        return pairs
    name, path = tables[0]
    if not name.lower().endswith(endings):
        if path.is_file() and not name.lower().endswith(ARCHIVES):
            raise ConfigError(f"{files}: a folder or a file with one of {', '.join((*endings, *ARCHIVES))} is expected")
        return pairs
    try:
        entries = first_entries(name, path, LOOKED_AT)
    except Exception as error:
        raise ConfigError(f"{path}: it cannot be read: {cause(error)}") from None
    columns = list(dict.fromkeys(column for entry in entries for column in entry))
    for named in filter(None, (image, text)):
        one_of("column", named, columns, name)
    values = {column: [entry[column] for entry in entries if entry.get(column) not in (None, "")] for column in columns}
    kinds = {column: _kind(some[0]) for column, some in values.items() if some}
    likely = ("image", "path", "url of an image", "url")
    image = image or next((c for kind in likely for c in columns if kinds.get(c) == kind), None)
    text = text or next(_texts(values, kinds), None)
    for what, found in (("image", image), ("text", text)):
        if found is None or not values[found]:
            raise ConfigError(
                f"{files}: no column of {what}s; found: {', '.join(columns) or 'no rows'}. Name it: --{what} COLUMN"
                " (texts alone need a card: docs/data.md)"
            )
    assert image
    assert text
    column = CONVERSATIONS if kinds.get(text) == CONVERSATIONS else "caption"
    field = f"{text}.0" if column == "caption" and isinstance(values[text][0], list) else text
    options: dict[str, Any] = {"files": files, "image": image, "texts": {column: field}}
    if kinds[image].startswith("url"):
        options["fetch"] = {}
    elif kinds[image] != "image" and (root := _root(tables, values[image])):
        options["root"] = root
    return {"kind": "table", "options": options}


def _kind(value: Any) -> str:
    """What a column is, by its first value."""
    if isinstance(value, list) and value:
        turns = isinstance(value[0], dict) and value[0].keys() & {"from", "role"}
        return CONVERSATIONS if turns else _kind(value[0])
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return "image"
    if not isinstance(value, str):
        return "other"
    if value.startswith(("http://", "https://")):
        return "url of an image" if is_image(value.partition("?")[0]) else "url"
    return "path" if is_image(value) else "text"


def _texts(values: dict[str, list[Any]], kinds: dict[str, str]) -> Iterator[str]:
    """Columns that may hold the text, likely ones first."""
    yield from (column for column, kind in kinds.items() if kind == CONVERSATIONS)
    texts = [column for column, kind in kinds.items() if kind == "text"]
    yield from sorted((c for c in texts if c.lower() in TEXTS), key=lambda column: TEXTS.index(column.lower()))
    yield from (column for column in texts if any(" " in value for value in values[column]))


def _root(tables: list[tuple[str, Path]], images: list[Any]) -> str | None:
    """The folder that the paths of tables start in; None where that is the folder of each, below what a card names.

    Raises ConfigError where none holds one of some images.
    """
    (name, table), several = tables[0], len({path.parent for _, path in tables}) > 1
    here, named = table.parent, table.parents[name.count("/")]
    beside = [named] if several else [*sorted(filter(Path.is_dir, here.iterdir())), here.parent]
    roots = [here, *beside, Path()]  # a folder beside one of several tables holds no images of the others
    flat = [image for value in images for image in (value if isinstance(value, list) else [value])]
    found = (image.get("path") if isinstance(image, dict) else image for image in flat)
    paths = [path for path in found if isinstance(path, str)]
    for root in roots:
        if any(isinstance(data, bytes) for _, data in picked(root, paths)):
            return None if several and root == here else os.path.normpath(root)
    shown, first = ", ".join(map(str, islice(roots, 5))), next(iter(paths), None)
    raise ConfigError(f"{table}: no image {first!r} below {shown}; paths are relative to a folder that holds them all")
