"""Pictures for the page: samples of the data, reconstructions, what the models drew and were asked about.

In: the facts of `gather` and the folders. Out: `Picture`s, whose bytes are data URIs, with a text for those who
cannot see them. Samples are the first ones or evenly spaced ones, never chosen: a report must not flatter.

Shape suffixes: B pictures, S side in pixels, C channels (RGB), N positions, D code depth.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from unifork.config import Card
from unifork.errors import DataError
from unifork.image_tokenizer.readers import read_back
from unifork.image_tokenizer.views import VARIANTS
from unifork.report.codec import Codec
from unifork.report.gather import DataSet, Evaluation, StageRun, views_of
from unifork.report.reading import Answered, Drawn, Same
from unifork.shards.job import QUARANTINE, quarantine_of, read_table
from unifork.shards.manifest import Manifest
from unifork.vocabulary import View

SAMPLES = 10
"""Pictures of a strip."""
SAMPLED_SHARDS = 3
"""Shards that are opened for it; a large set has thousands."""
QUARANTINED = 8
"""Quarantined rows shown, in turn from all reasons."""
MEASURED = 64
"""Pictures on which a data set's reader is held against reconstructions."""
DRAWN = 6
"""Pictures shown for each kind of prompt and split."""
ANSWERED = 3
"""Questions shown for each kind and split."""
LARGEST_EXACT, LARGEST = 96, 192
"""Pictures up to the first side in pixels are kept exactly (PNG), larger ones become JPEG of at most the second."""


@dataclass(frozen=True)
class Picture:
    """A picture of the page; without `src` it could not be read, and a placeholder stands in its place."""

    src: str | None
    alt: str
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Strip:
    """Pictures in a row, one for each text below."""

    title: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Rejected:
    """A row in quarantine."""

    key: str
    reason: str
    detail: str
    picture: Picture


@dataclass(frozen=True)
class DataPictures:
    """What is shown of a data set."""

    texts: list[str]
    strips: list[Strip]
    rejected: list[Rejected]
    reconstructions: list[Strip]
    """Original and reconstruction of each view, in turn."""
    detector: dict[str, Same]
    """Measured on these pictures, by view; empty for pictures that no reader reads."""


@dataclass(frozen=True)
class Shown:
    """A sample of a benchmark with the picture drawn for it, or asked about if that can be made again."""

    sample: Drawn | Answered
    picture: Picture | None


def picture(image: Image.Image, alt: str) -> Picture:
    """An image as a data URI."""
    exact = max(image.size) <= LARGEST_EXACT
    if not exact and max(image.size) > LARGEST:
        image = image.copy()
        image.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    transparent = image.has_transparency_data
    if exact or transparent:
        image.convert("RGBA" if transparent else "RGB").save(stream, "PNG", optimize=True)
    else:
        image.convert("RGB").save(stream, "JPEG", quality=85)
    kind = "png" if exact or transparent else "jpeg"
    text = base64.b64encode(stream.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{text}", alt, image.width, image.height)


def data_pictures(data: DataSet, filtered: Path, size: int, codec: Codec | None) -> DataPictures | None:
    """What is shown of a data set; None where it has not been filtered. Raises DataError for damaged shards.

    filtered: folder of its filtered shards. size: side of the views in pixels. codec: None leaves out reconstructions.
    """
    manifest = next((hop.manifest for hop in data.hops if hop.hop == "filter"), None)
    if manifest is None:
        return None
    rows = sample_rows(filtered, manifest, MEASURED, data.card)
    images = [Image.open(io.BytesIO(row["image"])) for row in rows]
    texts = [row["text"] for row in rows[:SAMPLES]]
    strips = [Strip("as received", [picture(i, f"{t}, as received") for i, t in zip(images, texts, strict=False)])]
    reconstructions: list[Strip] = []
    detector: dict[str, Same] = {}
    for view in views_of(data.card) if images else []:
        pixels_BSSC = np.stack([VARIANTS[view](image, size, data.card.matte) for image in images])
        strips.append(strip(f"{view} view", pixels_BSSC, texts))
        if codec is not None:
            drawn_BSSC = codec.reconstruct(pixels_BSSC)
            reconstructions.append(strip(f"{view}, original", pixels_BSSC, texts))
            reconstructions.append(strip("decoded from codes", drawn_BSSC, texts))
            if data.card.reader:
                detector[view] = Same(**read_back(data.card, pixels_BSSC, drawn_BSSC))
    return DataPictures(texts, strips, rejected_rows(filtered, manifest), reconstructions, detector)


def strip(title: str, pixels_BSSC: np.ndarray, texts: Sequence[str]) -> Strip:
    """As many pictures in a row as there are texts."""
    shown = zip(pixels_BSSC, texts, strict=False)
    return Strip(title, [picture(Image.fromarray(pixels), f"{text}, {title}") for pixels, text in shown])


def sample_rows(folder: Path, manifest: Manifest, count: int, card: Card) -> list[dict[str, Any]]:
    """Evenly spaced rows of evenly spaced shards, those to show first: key, image, and the first text a row has."""
    texts = list(dict.fromkeys(text for use in card.tasks.values() for text in use.texts if text != "conversations"))
    filled = [shard for shard in manifest.shards if shard.rows]
    shards = [filled[i] for i in _spread(len(filled), SAMPLED_SHARDS)]
    found: list[dict[str, Any]] = []
    for number, shard in enumerate(shards):
        share = (count + number) // len(shards)
        table = read_table(folder, shard, ["key", "image", *texts])
        found += table.take(_spread(shard.rows, share)).to_pylist()
    shown = _spread(len(found), SAMPLES)
    rows = [found[i] for i in [*shown, *sorted(set(range(len(found))) - set(shown))]]
    return [row | {"text": next((row[name] for name in texts if row[name]), row["key"])} for row in rows]


def rejected_rows(folder: Path, manifest: Manifest) -> list[Rejected]:
    """A few rows of the quarantine, in turn from all reasons, in the order of the shards."""
    waiting: dict[str, list[dict[str, Any]]] = {}
    for shard in manifest.shards:
        source = quarantine_of(folder, shard) if shard.dropped else None
        if source is not None:
            for row in _rows(source, folder / QUARANTINE / shard.path):
                waiting.setdefault(row["reason"], []).append(row)
        if sum(map(len, waiting.values())) >= 10 * QUARANTINED and len(waiting) >= len(manifest.dropped):
            break
    shown: list[Rejected] = []
    while len(shown) < QUARANTINED and any(waiting.values()):
        for reason in [reason for reason, rows in waiting.items() if rows][: QUARANTINED - len(shown)]:
            row = waiting[reason].pop(0)
            # Pillow's messages name Python objects by address, which differs from run to run
            detail = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "the bytes", row["detail"])
            shown.append(Rejected(row["key"], reason, detail, perhaps(row["image"], row["key"])))
    return shown


def perhaps(data: bytes | None, key: str) -> Picture:
    """A picture that may not be readable."""
    try:
        with Image.open(io.BytesIO(data or b"")) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # type: ignore[operator]
                return Picture(None, f"{key}: too large to be shown")
            return picture(image, f"{key}, in quarantine")
    except Exception:  # any decoder may raise anything on bytes that were rejected for this very reason
        return Picture(None, f"{key}: cannot be read")


def stage_pictures(run: StageRun, codec: Codec) -> dict[str, Picture]:
    """What a stage drew for each of its sample prompts."""
    if run.codes is None or run.summary is None:
        return {}
    prompts = run.summary.stage.sample_prompts
    return {
        prompt: picture(Image.fromarray(pixels), f"{prompt}, drawn after {run.name}")
        for prompt, pixels in zip(prompts, codec.decode(run.codes), strict=True)
    }


def drawn_pictures(found: Evaluation, codec: Codec) -> dict[str, dict[str, list[Shown]]]:
    """The first pictures of every kind of prompt, by kind and split."""
    if found.codes is None:
        return {}
    numbers = _first(found.drawn, DRAWN)
    decoded = codec.decode(found.codes[numbers])
    shown: dict[str, dict[str, list[Shown]]] = {}
    for number, pixels in zip(numbers, decoded, strict=True):
        sample = found.drawn[number]
        alt = f"{sample.prompt}: {'correct' if sample.correct else 'wrong'}"
        made = Shown(sample, picture(Image.fromarray(pixels), alt))
        shown.setdefault(sample.kind, {}).setdefault(sample.split, []).append(made)
    return shown


def answered_questions(found: Evaluation) -> list[Shown]:
    """The first questions of every kind and split, with their pictures where the benchmark can make them again."""
    seeds = {score.seed for score in found.scores}
    again = found.benchmark.image if len(seeds) == 1 else None
    shown = []
    for number in _first(found.answered, ANSWERED):
        sample = found.answered[number]
        image = again(sample.picture, min(seeds)) if again else None
        shown.append(Shown(sample, picture(image, f"the picture {sample.picture}") if image else None))
    return shown


def _first(samples: Sequence[Drawn | Answered], count: int) -> list[int]:
    """Positions of the first samples of every kind and split."""
    taken: dict[tuple[str, str], list[int]] = {}
    for number, sample in enumerate(samples):
        group = taken.setdefault((sample.kind, sample.split), [])
        if len(group) < count:
            group.append(number)
    return [number for group in taken.values() for number in group]


def _spread(length: int, count: int) -> list[int]:
    """At most `count` evenly spaced numbers below `length`."""
    return sorted({i * length // count for i in range(count)}) if length else []


def _rows(source: Path | io.BytesIO, path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(source, columns=["key", "reason", "detail", "image"]).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: damaged: {error}. Delete it and run the filter again.") from None
    return rows


VIEW_NOTES: dict[View, str] = {
    "crop": "short side to size, centre cut out: what generation learns to draw",
    "pad": "long side to size, rest grey: what understanding reads",
}
