"""Filtered shards as the image tokenizer learns from them: images of one view."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from unifork.config import Card, load_card
from unifork.image_tokenizer.training import without_repeats
from unifork.image_tokenizer.views import VIEWS
from unifork.layout import Layout
from unifork.randomness import keyed
from unifork.shards.job import read_table
from unifork.shards.manifest import read_manifest
from unifork.vocabulary import View

MAX_IMAGES = 20_000
"""Images of one view held in memory; a small tokenizer sees no more in its training."""


def sample_sets(datasets: Iterable[str], layout: Layout, size: int, seed: int, most: int) -> dict[str, np.ndarray]:
    """Every view that the tasks of the sets read, by `<set>/<view>`, as in `sample_views`; no image occurs twice."""
    views: dict[str, np.ndarray] = {}
    for name in datasets:
        card = load_card(name, layout.cards)
        for use in card.tasks.values():
            views[f"{name}/{use.view}"] = sample_views(layout.filtered(name), card, use.view, size, seed, most)
    return without_repeats(views)  # square images look the same in both views


def sample_views(folder: Path, card: Card, view: View, size: int, seed: int, most: int = MAX_IMAGES) -> np.ndarray:
    """One view of a set's images in a seeded order, uint8 (n, S, S, 3), n at most `most`."""
    manifest = read_manifest(folder)
    chosen = set(keyed(seed, card.name).permutation(manifest.rows)[:most].tolist())
    images, first = [], 0
    for shard in manifest.shards:
        wanted = [number for number in range(shard.rows) if first + number in chosen]
        column = read_table(folder, shard, ["image"]).column("image") if wanted else []
        for number in wanted:
            image = Image.open(io.BytesIO(column[number].as_py()))
            images.append(np.asarray(VIEWS[view](image, size, card.matte), np.uint8))
        first += shard.rows
    order = keyed(seed, card.name, "order").permutation(len(images))
    return np.stack(images)[order]
