"""What the benchmarks of the data encode: images of the world `shapes`, and a tokenizer of random weights."""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unifork.config import Card, DecoderConfig, EncoderConfig, load_card
from unifork.filters.worker import filtered_schema
from unifork.image_tokenizer.architecture import Architecture
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.layout import Layout
from unifork.shapes.source import ShapesOptions
from unifork.shapes.source import rows as world_rows
from unifork.shards.job import KeptRows, table_of, write_shard
from unifork.shards.manifest import Manifest, write_manifest
from unifork.shards.schema import columns_of, image_text_schema
from unifork.shards.task import ShardTask, Slice

DIFFERENT = 64
"""Images that are made; longer lists repeat them."""


def shapes_card() -> Card:
    """The card of the world."""
    return load_card("shapes", Path(__file__).parent.parent / "datasets")


def untrained(directory: Path, size: int, patch: int = 8, width: int = 64, layers: int = 3) -> Path:
    """A tokenizer directory: random weights, a codebook of 256 of its own features, 4 codes per position."""
    torch.manual_seed(0)
    levels = patch.bit_length()
    decoder = DecoderConfig(
        z_channels=16, channels=8, multipliers=(1,) * levels, blocks=0, attention_levels=(), norm_groups=4
    )
    tokenizer = ImageTokenizer(
        Architecture(
            image_size=size,
            patch_size=patch,
            position_grid=size // patch,
            encoder=EncoderConfig(hidden_size=width, layers=layers, heads=width // 32, intermediate_size=4 * width),
            depth=4,
            codebook_size=256,
            decoder=decoder,
        )
    )
    features = tokenizer.encoder(torch.rand(16, 3, size, size) * 2 - 1).flatten(0, 1)
    chosen = torch.randint(len(features), (256,))
    tokenizer.quantizer.codebook.copy_(features[chosen] * torch.rand(256, 1))
    tokenizer.save(directory)
    return directory


def jpegs(side: int) -> list[bytes]:
    """Scenes enlarged to a shorter side of `side` pixels under a grain, as JPEG of quality 90."""
    rng, out = np.random.default_rng(0), []
    for row in world_rows(ShapesOptions(), Slice(0, DIFFERENT), 0):
        image = Image.open(io.BytesIO(row["image"])).convert("RGB")
        scale = side / min(image.size)
        large = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 8, (large.height, large.width, 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        out.append(file.getvalue())
    return out


def kept_images(root: Path, count: int, shard_rows: int, side: int) -> KeptRows:
    """Image-text shards below a root, all rows of which a filter has kept."""
    card, layout = shapes_card(), Layout(root)
    images = jpegs(side)
    hashes = [hashlib.sha256(image).hexdigest() for image in images]
    for folder, schema in ((layout.raw, image_text_schema(card)), (layout.filtered, filtered_schema(card))):
        shards, place = [], folder(card.name)
        for number, first in enumerate(range(0, count, shard_rows)):
            plain = [
                {"key": f"{n:08d}", "image": images[n % DIFFERENT], "width": side, "height": side, "url": ""}
                | {
                    "sha256": hashes[n % DIFFERENT],
                    "license": card.license,
                    "caption": "an image",
                    "description": "one",
                }
                for n in range(first, min(first + shard_rows, count))
            ]
            task = ShardTask().placed(None, place / f"part-{number:05d}.parquet", None, "benchmark")
            shards.append(write_shard(task, table_of(plain, schema), {}).shard)
        columns = columns_of(schema)
        write_manifest(place, Manifest(kind="any", dataset=card.name, columns=columns, shards=tuple(shards)))
    return KeptRows(layout, card.name)
