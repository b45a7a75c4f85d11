"""Images for the page: samples of the data, reconstructions, what the models drew and were asked about.

In: what `reading` and the shards hold. Out: `ShownImage`s, whose bytes are data URIs; the template says what they show.
Samples are the first ones or evenly spaced ones, never chosen: a report must not flatter.

Shape suffixes: B images, S side in pixels, C channels (RGB), N positions, D code depth.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from unifork.config import Card
from unifork.errors import DataError
from unifork.filters.kept import KeptRows
from unifork.image_tokenizer.readers import read_back
from unifork.image_tokenizer.views import VARIANTS
from unifork.images import MAX_PIXELS, open_image
from unifork.report.codec import Codec
from unifork.report.reading import Found, undamaged
from unifork.shards.job import read_table
from unifork.shards.manifest import read_manifest
from unifork.shards.quarantine import QUARANTINE, quarantine_of
from unifork.vocabulary import VIEWS, View

SAMPLES = 10
"""Images of a strip."""
SAMPLED_SHARDS = 3
"""Shards that are opened for it; a large set has thousands."""
QUARANTINED = 8
"""Quarantined rows shown, in turn from all reasons."""
MEASURED = 64
"""Images on which a data set's reader is held against reconstructions."""
DRAWN = 6
"""Images shown for each kind of prompt and split."""
ANSWERED = 3
"""Questions shown for each kind and split."""
LARGEST_EXACT, LARGEST = 96, 192
"""Images up to the first side in pixels are kept exactly (PNG), larger ones become JPEG of at most the second."""


class ShownImage(NamedTuple):
    """An image of the page."""

    src: str
    width: int
    height: int


def shown_image(image: Image.Image) -> ShownImage:
    """An image as a data URI."""
    exact = max(image.size) <= LARGEST_EXACT
    if not exact and max(image.size) > LARGEST:
        image = image.copy()
        image.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    transparent = image.has_transparency_data
    kind = "png" if exact or transparent else "jpeg"
    image.convert("RGBA" if transparent else "RGB").save(stream, kind, optimize=kind == "png", quality=85)
    text = base64.b64encode(stream.getvalue()).decode()
    return ShownImage(f"data:image/{kind};base64,{text}", image.width, image.height)


def shown_images(pixels_BSSC: Iterable[np.ndarray]) -> list[ShownImage]:
    """Each of them as a data URI."""
    return [shown_image(Image.fromarray(pixels_SSC)) for pixels_SSC in pixels_BSSC]


def views_of(card: Card) -> list[View]:
    """The views a card's tasks ask for."""
    return [view for view in VIEWS if any(use.view == view for use in card.tasks.values())]


def data_images(card: Card, kept: KeptRows, size: int, codec: Codec | None) -> dict[str, Any]:
    """What is shown of a data set. Raises DataError for damaged shards.

    size: side of the views in pixels. codec: None leaves out reconstructions.
    Strips are images in a row, one for each of `texts`; `detector` says by view how many of them a card's reader
    reads the same from their codes.
    """
    rows = sample_rows(kept, MEASURED, card)
    images = [open_image(row["image"]) for row in rows]
    strips = {"as received": [shown_image(image) for image in images[:SAMPLES]]}
    reconstructions: list[tuple[str, list[ShownImage]]] = []
    detector: dict[str, dict[str, int]] = {}
    for view in views_of(card) if images else []:
        pixels_BSSC = np.stack([VARIANTS[view](image, size, card.matte) for image in images])
        strips[f"{view} view"] = shown_images(pixels_BSSC[:SAMPLES])
        if codec is not None:
            drawn_BSSC = codec.reconstruct(pixels_BSSC)
            reconstructions.append((f"{view}, original", strips[f"{view} view"]))
            reconstructions.append(("decoded from codes", shown_images(drawn_BSSC[:SAMPLES])))
            if card.reader:
                detector[view] = read_back(card, pixels_BSSC, drawn_BSSC)
    return {
        "texts": [row["text"] for row in rows[:SAMPLES]],
        "strips": strips,
        "reconstructions": reconstructions,
        "detector": detector,
        "rejected": rejected_rows(kept),
    }


def sample_rows(kept: KeptRows, count: int, card: Card) -> list[dict[str, Any]]:
    """Evenly spaced rows of evenly spaced shards, those to show first: key, image, and the first text a row has."""
    texts = list(dict.fromkeys(text for use in card.tasks.values() for text in use.texts if text != "conversations"))
    filled = [number for number, shard in enumerate(kept.shards) if shard.rows]
    shards = [filled[i] for i in _spread(len(filled), SAMPLED_SHARDS)]
    found: list[dict[str, Any]] = []
    for number, shard in enumerate(shards):
        share = (count + number) // len(shards)
        table = kept.table(shard, ["key", "image", *texts])
        found += table.take(_spread(table.num_rows, share)).to_pylist()
    shown = _spread(len(found), SAMPLES)
    rows = [found[i] for i in [*shown, *sorted(set(range(len(found))) - set(shown))]]
    return [row | {"text": next((row[name] for name in texts if row[name]), row["key"])} for row in rows]


def rejected_rows(kept: KeptRows) -> list[dict[str, Any]]:
    """A few rows of the filter's quarantine, in turn from all reasons, in the order of the shards.

    Each has its key, reason and detail, and its image, or in words why its bytes cannot be shown.
    """
    waiting: dict[str, list[dict[str, Any]]] = {}
    for number, shard in enumerate(kept.shards):
        source = quarantine_of(kept.filtered, shard) if shard.dropped else None
        if source is not None:
            with undamaged(kept.filtered / QUARANTINE / shard.path):
                rows = pq.read_table(source, columns=["key", "reason", "detail"]).to_pylist()
            for row in rows:
                waiting.setdefault(row["reason"], []).append(row | {"shard": number})
        if sum(map(len, waiting.values())) >= 10 * QUARANTINED and len(waiting) >= len(kept.manifest.dropped):
            break
    shown = [row for row in chain.from_iterable(zip_longest(*waiting.values())) if row][:QUARANTINED]
    for row in shown:
        row["image"] = _perhaps(kept.image(row.pop("shard"), row["key"]))
    return shown


def samples(records: Sequence[Found], count: int) -> list[Found]:
    """The first items of every kind and split, with what the first rule of their benchmark says of them."""
    groups: dict[tuple[str, str], list[Found]] = {}
    for record in records:
        record["kind"] = record["about"].get("kind", "all")
        groups.setdefault((record["kind"], record["split"]), []).append(record)
    shown = [record for group in groups.values() for record in group[:count]]
    for record in shown:
        verdict = next(iter(record["verdicts"].values()), {"right": 0.0, "faults": ["no public truth"]})
        record["correct"], record["faults"] = bool(verdict["right"]), verdict["faults"]
    return shown


def drawn_samples(records: Sequence[Found], answers: Path) -> dict[str, dict[str, list[Found]]]:
    """Samples of prompts by kind and split, each with the image that was drawn for it."""
    shown: dict[str, dict[str, list[Found]]] = {}
    chosen = samples(records, DRAWN)
    for record, data in zip(chosen, stored_images(answers, [record["id"] for record in chosen], "image"), strict=True):
        record["drawn"] = shown_image(open_image(data))
        shown.setdefault(record["kind"], {}).setdefault(record["split"], []).append(record)
    return shown


def answered_samples(records: Sequence[Found], items: Path) -> list[Found]:
    """Samples of questions, each with its image."""
    chosen = samples(records, ANSWERED)
    for record, data in zip(chosen, stored_images(items, [record["id"] for record in chosen], "bytes"), strict=True):
        record["asked_about"] = shown_image(open_image(data))
    return chosen


def stored_images(folder: Path, ids: Sequence[str], column: str) -> list[bytes]:
    """Images of a table of items or answers, by id. Raises DataError for one that is not there."""
    found: dict[str, bytes] = {}
    shards = iter(read_manifest(folder).shards if ids else ())
    while missing := set(ids) - found.keys():
        shard = next(shards, None)
        if shard is None:
            raise DataError(f"{folder}: no image of {sorted(missing)[0]}; run the stage that writes it again")
        last: dict[str | None, bytes] = {}
        for row in read_table(folder, shard).to_pylist():
            image = last.setdefault(row.get("sha256"), row[column]) if row.get("sha256") else row[column]
            found[row["id"]] = image
    return [found[name] for name in ids]


def _perhaps(data: bytes | None) -> ShownImage | str:
    """An image that may not be readable, or in words what hinders it."""
    try:
        with open_image(data or b"") as image:
            return shown_image(image) if image.width * image.height <= MAX_PIXELS else "too large to be shown"
    except Exception:  # any decoder may raise anything on bytes that were rejected for this very reason
        return "cannot be read"


def _spread(length: int, count: int) -> list[int]:
    """At most `count` evenly spaced numbers below `length`."""
    return sorted({i * length // count for i in range(count)}) if length else []
