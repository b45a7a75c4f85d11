"""The page that stands beside published shards: `page.jinja` filled in, with the head that the Hub reads.

In: plain facts of the views (`ViewFacts`) and the data set's card. Out: a text that is equal for equal facts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from unifork.config import Card
from unifork.publish.shards import LAYOUT
from unifork.shards.manifest import Manifest
from unifork.vocabulary import Task

README = "README.md"
PAGE = Path(__file__).with_name("page.jinja")

HUB_LICENSES = {
    *("apache-2.0", "mit", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "odc-by", "odbl", "pddl"),
}
"""Identifiers of the Hub's list that are SPDX identifiers in small letters; any other license is `other`."""

SIZE_CATEGORIES = (
    *("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"),
    *("10B<n<100B", "100B<n<1T", "n>1T"),
)
"""The Hub's names for numbers of rows: of up to 3 digits, of 4, of 5, ..."""
HUB_TASKS: dict[Task, str] = {"generation": "text-to-image", "understanding": "image-to-text"}


@dataclass(frozen=True)
class ViewFacts:
    """One published view."""

    name: str
    """The view, which is the name of the folder and of the Hub's configuration."""
    task: Task
    encoded: Manifest
    """Of the code shards; its lineage tells tokenizer and encoding."""
    manifest: Manifest
    """Of the published shards."""
    plain_bytes: int
    """Size of all columns without compression."""


def size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    return SIZE_CATEGORIES[min(max(len(str(rows)) - 3, 0), len(SIZE_CATEGORIES) - 1)]


def readme(card: Card, views: Sequence[ViewFacts], stages: Mapping[str, Manifest | None]) -> str:
    """The page of the data set. stages: manifests of download and filter where they are at hand."""
    name, rows = card.licence.lower(), max(view.manifest.rows for view in views)
    example = max(views, key=lambda view: view.manifest.rows > 0)
    page = jinja2.Template(PAGE.read_text(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text: str = page.render(
        card=card,
        views=views,
        stages=stages,
        license=name if name in HUB_LICENSES else None,
        license_name=re.sub(r"[^a-z0-9]+", "-", name).strip("-"),
        size=size_category(rows),
        hub_tasks=HUB_TASKS,
        layout=LAYOUT,
        example=example,
        shard=max(example.manifest.shards, key=lambda shard: shard.rows > 0),
    )
    return text
