"""The page that stands beside published shards: `page.jinja` filled in, with the head that the Hub reads.

In: plain facts of the views (`ViewFacts`) and the data set's card. Out: a text that is equal for equal facts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

from unifork import __version__
from unifork.config import Card
from unifork.publish.shards import LAYOUT
from unifork.shards.manifest import Manifest, Shard
from unifork.vocabulary import Task

README = "README.md"
PAGE = Path(__file__).with_name("page.jinja")
HUB = yaml.safe_load(Path(__file__).with_name("hub.yaml").read_text())
"""Licenses, sizes and tasks by the Hub's names."""


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

    @property
    def shard(self) -> Shard:
        """The first published shard with rows, if any has some."""
        return max(self.manifest.shards, key=lambda shard: shard.rows > 0)

    @property
    def example(self) -> str:
        """Its name in the publication."""
        return f"{self.name}/{self.shard.path}"


@dataclass(frozen=True)
class Offer:
    """What a page says beside the facts: where a stranger gets what is needed."""

    library: str | None = None
    """What pip installs the library from, as a shell takes it; None: the page names the version alone."""
    tokenizer: str | None = None
    """Address of the image tokenizer, for a page of codes without it."""
    with_tokenizer: bool = False
    """Whether it lies beside the codes."""
    license: str | None = None
    """Of a model, by the Hub's name."""
    version: str = __version__
    """Of the library."""


def size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    names: list[str] = HUB["size_categories"]
    return names[min(max(len(str(rows)) - 3, 0), len(names) - 1)]


def readme(
    card: Card, views: Sequence[ViewFacts], stages: Mapping[str, Manifest | None], offer: Offer, samples: bool
) -> str:
    """The page of the data set. stages: manifests of download and filter where they are at hand.

    samples: whether decoded images lie beside it.
    """
    name, rows = card.license.lower(), max(view.manifest.rows for view in views)
    page = jinja2.Template(PAGE.read_text(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text: str = page.render(
        card=card,
        views=views,
        stages=stages,
        license=name if name in HUB["licenses"] else None,
        license_name=re.sub(r"[^a-z0-9]+", "-", name).strip("-"),
        size=size_category(rows),
        hub_tasks=HUB["tasks"],
        layout=LAYOUT,
        example=max(views, key=lambda view: view.manifest.rows > 0),
        offer=offer,
        samples=samples,
    )
    return text
