"""Kept images as the image tokenizer learns from them: in the views of their set."""

from collections.abc import Iterable

import numpy as np

from unifork.config import Card, load_card
from unifork.image_tokenizer.training import without_repeats
from unifork.images import VIEWS, open_image
from unifork.layout import Layout
from unifork.randomness import keyed
from unifork.shards.job import KeptRows
from unifork.vocabulary import View

MAX_IMAGES = 20_000
"""Images of one view held in memory; a small tokenizer sees no more in its training."""


def sample_sets(datasets: Iterable[str], layout: Layout, size: int, seed: int, most: int) -> dict[str, np.ndarray]:
    """Every view that the tasks of the sets read, by `<set>/<view>`, as in `sample_views`; no image occurs twice."""
    views: dict[str, np.ndarray] = {}
    for name in datasets:
        card, rows = load_card(name, layout.cards), KeptRows(layout, name)
        views |= {f"{name}/{view}": images for view, images in sample_views(rows, card, size, seed, most).items()}
    return without_repeats(views)  # square images look the same in both views


def sample_views(rows: KeptRows, card: Card, size: int, seed: int, most: int = MAX_IMAGES) -> dict[View, np.ndarray]:
    """The views of a set's images in a seeded order, none held out, each uint8 (n, S, S, 3), n at most `most`.

    An image is decoded once for all of them.
    """
    chosen = set(keyed(seed, card.name).permutation(rows.manifest.rows)[:most].tolist())
    views: dict[View, list[np.ndarray]] = {use.view: [] for use in card.tasks.values()}
    first = 0
    for number, shard in enumerate(rows.shards):
        wanted = [row for row in range(shard.rows) if first + row in chosen]
        columns = rows.table(number, ["key", "image"]) if wanted else {}
        for row in wanted:
            data = columns["image"][row].as_py()
            if data is None or card.holds_out(columns["key"][row].as_py()):
                continue
            image = open_image(data)
            for view, images in views.items():
                images.append(np.asarray(VIEWS[view](image, size, card.matte), np.uint8))
        first += shard.rows
    orders = {view: keyed(seed, card.name, "order").permutation(len(images)) for view, images in views.items()}
    return {view: np.stack([images[place] for place in orders[view]]) for view, images in views.items()}
