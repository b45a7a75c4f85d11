"""Publishing a data set and bringing a publication back.

A publication is a folder: one folder of shards per view with its manifest, `README.md`, `croissant.json`,
`dataset.yaml` (the card) and `SHA256SUMS`. It is made whole on this machine, by a hop that goes on where
it was killed, and then compared file by file with where it goes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from unifork.cluster import run_jobs
from unifork.config import Card, HopResources, load_card, parse
from unifork.errors import ConfigError, DataError, writing
from unifork.filters.takedown import Listing
from unifork.publish.card import CROISSANT, README, ViewFacts, croissant, readme
from unifork.publish.shards import Fetch, Publish, fetch_job, publish_job
from unifork.publish.stores import CHECKSUMS, checksums, checksums_text, read
from unifork.publish.takedown import withdrawn_keys
from unifork.shards.job import ShardJob
from unifork.shards.manifest import MANIFEST, TEMPORARY, Manifest, file_sha256, read_manifest, write_atomically
from unifork.shards.stores import Store

CARD = "dataset.yaml"
HOPS = {"download": "raw", "filter": "filtered"}
"""Hops whose counts the page shows, and the folder of each."""

Tell = Callable[[ShardJob], None]


@dataclass(frozen=True)
class Layout:
    """Where an experiment keeps its data."""

    root: Path = Path()

    def folder(self, hop: str, dataset: str) -> Path:
        """Folder of a data set after a hop: raw, filtered, codes or published."""
        return self.root / "data" / hop / dataset

    @property
    def cards(self) -> Path:
        """The folder of cards."""
        return self.root / "datasets"


def permitted(card: Card) -> None:
    """Raise ConfigError, with the reason, when the codes of a set may not be published."""
    if not card.redistribute_codes:
        raise ConfigError(
            f"{card.name}: its card says redistribute_codes: false (licence: {card.licence}). Codes can be decoded "
            f"to pictures, so publishing them is redistributing the pictures. What can be given away is the recipe: "
            f"the card, the parameters and the manifests, with which others make the same codes from their own copy. "
            f"See {card.homepage}"
        )


def build(dataset: str, layout: Layout, folder: Path, takedown: Listing | None, tell: Tell) -> list[ViewFacts]:
    """Make the publication of a data set in a folder; what is there and right is kept.

    takedown: what names rows to leave out. Raises ConfigError where the licence forbids
    publishing, DataError where codes are missing or damaged.
    """
    card = load_card(dataset, layout.cards)
    permitted(card)
    with writing(folder):
        (folder / CHECKSUMS).unlink(missing_ok=True)
        for half_written in folder.glob(f".*{TEMPORARY}*"):
            half_written.unlink()
    views = []
    for task, use in card.tasks.items():
        codes = layout.folder("codes", dataset) / use.view
        withdrawn = withdrawn_keys(takedown, dataset, codes, layout.folder("filtered", dataset))
        hop = publish_job(card, task, codes, folder / use.view, withdrawn)
        (manifest,) = run_jobs([hop], Publish, hop.lineage["about"])
        views.append(ViewFacts(task, manifest, plain_bytes(folder / use.view, manifest)))
    hops = {hop: _manifest_at_hand(layout.folder(name, dataset)) for hop, name in HOPS.items()}
    _write_texts(
        folder,
        {
            README: readme(card, views, hops),
            CROISSANT: json.dumps(croissant(card, views), indent=1, ensure_ascii=False) + "\n",
            CARD: _card_text(card),
        },
        views,
    )
    return views


def plain_bytes(folder: Path, manifest: Manifest) -> int:
    """Size of the columns of all shards without compression, as their footers say."""
    footers = (pq.read_metadata(folder / shard.path) for shard in manifest.shards)
    return sum(footer.row_group(group).total_byte_size for footer in footers for group in range(footer.num_row_groups))


def fetch(store: Store, name: str, layout: Layout, tell: Tell) -> list[Manifest]:
    """Bring a publication back as `data/codes/<name>`, and its card where there is none of that name.

    Every file is checked against SHA256SUMS. Raises DataError where the publication is not complete or damaged.
    """
    sums = checksums(store)

    def text(file: str) -> bytes:
        if file not in sums:
            raise DataError(f"{store.uri}: {CHECKSUMS} names no {file}; this is no publication of codes")
        return read(store, file, sums[file])

    card = parse(Card, {**yaml.safe_load(text(CARD)), "name": name}, f"{store.uri}: {CARD}")
    manifests = []
    for use in card.tasks.values():
        file = f"{use.view}/{MANIFEST}"
        published = parse(Manifest, json.loads(text(file)), f"{store.uri}: {file}")
        hop = fetch_job(published, name, store.uri, use.view, layout.folder("codes", name) / use.view)
        manifests += run_jobs([hop], Fetch)
    path = layout.cards / f"{name}.yaml"
    if not path.exists():
        write_atomically(path, lambda temporary: temporary.write_text(_card_text(card)))
    return manifests


def _write_texts(folder: Path, texts: dict[str, str], views: list[ViewFacts]) -> None:
    """The files beside the shards, and the checksums of all."""
    for name, text in texts.items():
        write_atomically(folder / name, lambda path, text=text: path.write_text(text))  # type: ignore[misc]
    sums = {f"{view.name}/{shard.path}": shard.sha256 for view in views for shard in view.manifest.shards}
    for name in [*texts, *(f"{view.name}/{MANIFEST}" for view in views)]:
        sums[name] = file_sha256(folder / name)
    write_atomically(folder / CHECKSUMS, lambda path: path.write_text(checksums_text(sums)))


def _card_text(card: Card) -> str:
    return str(yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110))


def _manifest_at_hand(folder: Path) -> Manifest | None:
    return read_manifest(folder) if (folder / MANIFEST).exists() else None
