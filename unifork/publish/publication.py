"""Publishing a data set and bringing a publication back.

A publication is a folder: one folder of shards per view with its manifest, `README.md`, decoded images,
`dataset.yaml` (the card), on demand the image tokenizer, and `SHA256SUMS`. It is made whole on this machine, by a job
that goes on where it was killed, and then compared file by file with where it goes.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from unifork.cluster import run_jobs
from unifork.config import Card, load_card, parse
from unifork.errors import ConfigError, DataError, IdentityError, writing
from unifork.filters.rules import Listing
from unifork.layout import Layout
from unifork.publish.card import README, Offer, ViewFacts, readme
from unifork.publish.samples import codebook_of, first_codes, strip
from unifork.publish.shards import Fetch, Publish, fetch_job, publish_job
from unifork.publish.stores import (
    CHECKSUMS,
    SAMPLES,
    TOKENIZER,
    bring,
    checksums,
    checksums_text,
    hashes,
    open_store,
    read,
)
from unifork.publish.takedown import withdrawn_keys
from unifork.shards.manifest import MANIFEST, TEMPORARY, Manifest, file_sha256, read_manifest, write_atomically
from unifork.shards.repair import faults, repair
from unifork.stores import Store

CARD = "dataset.yaml"


def build(dataset: str, layout: Layout, folder: Path, takedown: Listing | None, offer: Offer) -> list[ViewFacts]:
    """Make the publication of a data set in a folder; what is there and right is kept.

    takedown: what names rows to leave out. Raises ConfigError where the license forbids
    publishing, DataError where codes are missing or damaged, IdentityError where `offer` wants the tokenizer beside
    them and another is here.
    """
    card = load_card(dataset, layout.cards)
    if not card.redistribute_codes:
        raise ConfigError(
            f"{card.name}: its card says redistribute_codes: false (license: {card.license}). Codes can be decoded "
            f"to images, so publishing them is redistributing the images. What can be given away is the recipe: "
            f"the card, the parameters and the manifests, with which others make the same codes from their own copy. "
            f"See {card.homepage}"
        )
    codebooks = {
        read_manifest(layout.codes / dataset / use.view).lineage.get("codebook_id") for use in card.tasks.values()
    }
    found = codebook_of(layout.image_tokenizer)
    if offer.with_tokenizer and codebooks != {found}:
        raise IdentityError(
            f"{layout.image_tokenizer}: codebook_id {found}, but the codes of {dataset} are of "
            f"{', '.join(map(str, codebooks))}; only the tokenizer that made them goes beside them"
        )
    before = begin(folder)
    places = {"download": layout.raw(dataset), "filter": layout.filtered(dataset)}
    views: list[ViewFacts] = []
    sums: dict[str, str] = {}
    for task, use in card.tasks.items():
        codes, place = layout.codes / dataset / use.view, folder / use.view
        if place.exists():  # what is given away is read again, kept or not
            repair(faults(place))
        job = publish_job(card, task, codes, place, withdrawn_keys(takedown, dataset, codes, layout.measured(dataset)))
        (manifest,) = run_jobs([job], Publish, job.lineage["about"])  # here: writing is fast beside uploading
        views.append(ViewFacts(use.view, task, read_manifest(codes), manifest, plain_bytes(place, manifest)))
        sums |= {f"{use.view}/{shard.path}": shard.sha256 for shard in manifest.shards}
        sums[f"{use.view}/{MANIFEST}"] = file_sha256(place / MANIFEST)
    stages = {name: read_manifest(place) if (place / MANIFEST).exists() else None for name, place in places.items()}
    if offer.with_tokenizer:
        beside = hashes(layout.image_tokenizer)
        bring(open_store(str(layout.image_tokenizer)), beside, folder / TOKENIZER)
        sums |= {f"{TOKENIZER}/{name}": digest for name, digest in beside.items()}
    shown = (first_codes(folder / view.example) for view in views if codebooks == {found})
    images = next((codes for codes in shown if len(codes)), None)
    files = {CARD: _card_text(card).encode(), README: readme(card, views, stages, offer, images is not None).encode()}
    if images is not None:
        files[SAMPLES] = strip(images, layout.image_tokenizer)
    finish(folder, files, sums, before)
    return views


def begin(folder: Path) -> set[str]:
    """Make a publication one that is not whole; the names of its files so far."""
    with writing(folder):
        before = {*checksums(open_store(str(folder)))} if (folder / CHECKSUMS).exists() else set[str]()
        (folder / CHECKSUMS).unlink(missing_ok=True)
        for half_written in folder.rglob(f".*{TEMPORARY}*"):
            half_written.unlink()
    return before


def finish(folder: Path, files: Mapping[str, bytes], sums: dict[str, str], before: set[str]) -> None:
    """Write the last files and the checksums of all; what was published before and is no more goes."""
    for name, data in files.items():
        _write(folder / name, data)
        sums[name] = file_sha256(folder / name)
    with writing(folder):
        for name in before - {*sums}:
            (folder / name).unlink(missing_ok=True)
    _write(folder / CHECKSUMS, checksums_text(sums).encode())


def plain_bytes(folder: Path, manifest: Manifest) -> int:
    """Size of the columns of all shards without compression, as their footers say."""
    footers = (pq.read_metadata(folder / shard.path) for shard in manifest.shards)
    return sum(footer.row_group(group).total_byte_size for footer in footers for group in range(footer.num_row_groups))


def fetch(store: Store, name: str, layout: Layout) -> list[Manifest]:
    """Bring a publication back as `data/codes/<name>`, its card where there is none of that name, and its tokenizer.

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
        job = fetch_job(published, name, store.uri, use.view, layout.codes / name / use.view)
        manifests += run_jobs([job], Fetch)
    path = layout.cards / f"{name}.yaml"
    if not path.exists():
        _write(path, _card_text(card).encode())
    bring(store, sums, layout.fetched_tokenizer(name), f"{TOKENIZER}/")
    return manifests


def _write(path: Path, data: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _card_text(card: Card) -> str:
    return str(yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110))
