"""The page that stands beside published shards: `page.jinja` filled in, below a head that the Hub reads.

In: plain facts of the views (`ViewFacts`) and the data set's card. Out: a text that is equal for equal facts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from unifork.config import Card
from unifork.publish.shards import LAYOUT, features_of
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

    task: Task
    manifest: Manifest
    """Of the published shards."""
    plain_bytes: int
    """Size of all columns without compression."""

    @property
    def name(self) -> str:
        """The view, which is the name of the folder and of the Hub's configuration."""
        return str(self.manifest.lineage["about"]["view"])

    @property
    def encoded(self) -> Manifest:
        """Manifest of the code shards; its lineage tells tokenizer and encoding."""
        return Manifest.model_validate(self.manifest.lineage["codes"])


def size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    return SIZE_CATEGORIES[min(max(len(str(rows)) - 3, 0), len(SIZE_CATEGORIES) - 1)]


def front_matter(card: Card, views: Sequence[ViewFacts]) -> DatasetCardData:
    """The head that the Hub reads: license, size, configurations, features."""
    name = card.licence.lower()
    known = name in HUB_LICENSES
    return DatasetCardData(
        license=name if known else "other",
        license_name=None if known else re.sub(r"[^a-z0-9]+", "-", name).strip("-"),
        license_link=None if known else card.homepage,
        pretty_name=card.title,
        size_categories=[size_category(max(view.manifest.rows for view in views))],
        task_categories=[HUB_TASKS[view.task] for view in views],
        tags=["image-tokens", "residual-vq", "unifork"],
        configs=[
            {
                "config_name": view.name,
                "data_files": [{"split": "train", "path": f"{view.name}/train-*.parquet"}],
                **({"default": True} if number == 0 else {}),
            }
            for number, view in enumerate(views)
        ],
        dataset_info=[
            {
                "config_name": view.name,
                "features": features_of(view.manifest.columns),
                "splits": [{"name": "train", "num_bytes": view.plain_bytes, "num_examples": view.manifest.rows}],
                "download_size": sum(shard.bytes for shard in view.manifest.shards),
                "dataset_size": view.plain_bytes,
            }
            for view in views
        ],
    )


def readme(card: Card, views: Sequence[ViewFacts], stages: Mapping[str, Manifest | None]) -> str:
    """The page of the data set. stages: manifests of download and filter where they are at hand."""
    example = next((view for view in views if view.manifest.rows), views[0])
    shards = example.manifest.shards
    shard = next((shard for shard in shards if shard.rows), shards[0])
    facts: dict[str, Any] = {"card": card, "views": views, "stages": stages, "layout": LAYOUT}
    facts |= {"example": example, "shard": shard}
    return f"{DatasetCard.from_template(front_matter(card, views), str(PAGE), **facts)}\n"
