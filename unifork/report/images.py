"""Images for the page: samples of the data, reconstructions, what models drew, what benchmarks ask about.

In: pixels, and the shards. Out: `ShownImage`s, whose bytes are data URIs, and tables of them.
Samples are the first ones or evenly spaced ones, never chosen: a report must not flatter.

Shape suffixes: B images, S side in pixels, C channels (RGB), N positions, D code depth.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from unifork.config import Card
from unifork.errors import DataError
from unifork.images import MAX_PIXELS, VARIANTS, open_image
from unifork.report.codec import Codec
from unifork.report.reading import undamaged
from unifork.report.tables import Table, data_uri
from unifork.shards.job import KeptRows, read_table
from unifork.shards.manifest import read_manifest
from unifork.shards.task import QUARANTINE, quarantine_of
from unifork.training.validation import spread
from unifork.vocabulary import VIEWS, View

SAMPLES = 10
"""Images of a strip."""
SAMPLED_SHARDS = 3
"""Shards that are opened for it; a large set has thousands."""
QUARANTINED = 8
"""Quarantined rows shown, in turn from all reasons."""
LARGEST_EXACT, LARGEST = 96, 192
"""Images up to the first side in pixels are kept exactly (PNG), larger ones become JPEG of at most the second."""


class ShownImage(NamedTuple):
    """An image of the page."""

    src: str
    width: int
    height: int
    alt: str = ""


Strip = Sequence[tuple[str, ShownImage]]
"""Texts and images for them."""


def shown_image(image: Image.Image, alt: str = "") -> ShownImage:
    """An image as a data URI. alt: what it shows."""
    exact = max(image.size) <= LARGEST_EXACT
    if not exact and max(image.size) > LARGEST:
        image = image.copy()
        image.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    transparent = image.has_transparency_data
    kind = "png" if exact or transparent else "jpeg"
    image.convert("RGBA" if transparent else "RGB").save(stream, kind, optimize=kind == "png", quality=85)
    return ShownImage(data_uri(f"image/{kind}", stream.getvalue()), image.width, image.height, alt)


def shown_images(pixels_BSSC: Iterable[np.ndarray]) -> list[ShownImage]:
    """Each of them as a data URI."""
    return [shown_image(Image.fromarray(pixels_SSC)) for pixels_SSC in pixels_BSSC]


def views_of(card: Card) -> list[View]:
    """The views a card's tasks ask for."""
    return [view for view in VIEWS if any(use.view == view for use in card.tasks.values())]


def data_images(card: Card, kept: KeptRows, size: int, codec: Codec | None) -> Table:
    """Images of a data set as received, in each view, and decoded from codes. Raises DataError for damaged shards.

    size: side of the views in pixels. codec: None leaves out what is decoded.
    """
    rows = sample_rows(kept, card)
    images = [open_image(row["image"]) for row in rows]
    strips = [("as received", [shown_image(image) for image in images])]
    for view in views_of(card) if images else []:
        pixels_BSSC = np.stack([VARIANTS[view](image, size, card.matte) for image in images])
        strips.append((f"{view} view", shown_images(pixels_BSSC)))
        if codec is not None:
            strips.append((f"{view} view, decoded from codes", shown_images(codec.reconstruct(pixels_BSSC))))
    texts = [row["text"] for row in rows]
    return grid("Images", [(title, [*zip(texts, strip, strict=True)]) for title, strip in strips if strip])


def grid(label: str, strips: Sequence[tuple[str, Strip | None]]) -> Table:
    """Images with texts: a row for each title, a column for each text, two for one that a row has twice.

    A strip that is None is not there yet.
    """
    found: dict[str, dict[tuple[str, int], ShownImage]] = {title: {} for title, _ in strips}
    for title, strip in strips:
        row = found[title]
        for text, image in strip or ():
            number = next(number for number in range(len(row) + 1) if (text, number) not in row)
            row[text, number] = image._replace(alt=f"{text}, {title}")
    columns = list(dict.fromkeys(key for row in found.values() for key in row))
    texts = [text for text, _ in columns] or ["Images"]
    cells = {title: [row.get(key, "") for key in columns] for title, row in found.items()}
    return Table(
        label, ["", *texts], [[title, *([None] if strip is None else cells[title])] for title, strip in strips]
    )


def sample_rows(kept: KeptRows, card: Card) -> list[dict[str, Any]]:
    """Evenly spaced rows with an image of evenly spaced shards: key, image, and the first text a row has."""
    texts = list(dict.fromkeys(text for use in card.tasks.values() for text in use.texts if text != "conversations"))
    filled = [number for number, shard in enumerate(kept.shards) if shard.rows]
    shards = [filled[i] for i in spread(len(filled), SAMPLED_SHARDS)]
    found: list[dict[str, Any]] = []
    for number, shard in enumerate(shards):
        table = kept.table(shard, ["key", "image", *texts])
        table = table.filter(pc.is_valid(table["image"]))
        places = spread(table.num_rows, (SAMPLES + number) // len(shards))
        found += table.take(pa.array(places, pa.int64())).to_pylist()
    return [row | {"text": next((row[name] for name in texts if row[name]), row["key"])} for row in found]


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
        row["image"] = _perhaps(kept.image(row.pop("shard"), row["key"]), f"{row['key']}, in quarantine")
    return shown


def stored_images(folder: Path, alts: Mapping[str, str], column: str) -> dict[str, ShownImage]:
    """Images of a table of items or answers, by id. Raises DataError where they lack it. alts: what they show."""
    found: dict[str, ShownImage] = {}
    shards = iter(read_manifest(folder).shards if alts else ())
    while missing := alts.keys() - found.keys():
        shard = next(shards, None)
        if shard is None:
            raise DataError(f"{folder}: no image of {min(missing)}; run the stage that writes it again")
        last: dict[str | None, bytes] = {}  # an image that a shard has had already is null there
        rows = read_table(folder, shard).to_pylist()
        for row in rows if any(row["id"] in missing for row in rows) else ():
            image = last.setdefault(row.get("sha256") or row["id"], row[column])
            if row["id"] in missing:
                found[row["id"]] = shown_image(open_image(image), alts[row["id"]])
    return found


def _perhaps(data: bytes | None, alt: str) -> ShownImage | str:
    """An image that may not be readable, or in words what hinders it."""
    try:
        with open_image(data or b"") as image:
            return shown_image(image, alt) if image.width * image.height <= MAX_PIXELS else "too large to be shown"
    except Exception:  # any decoder may raise anything on bytes that were rejected for this very reason
        return "cannot be shown"
