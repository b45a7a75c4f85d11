"""The world as a source of rows: a range of numbers goes in, rows as every other source yields them come out.

Row number `index` is always the same, whatever range it is asked for in: its bytes and texts are a
function of (seed, index) and of the installed Pillow, whose PNG compression decides the bytes.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import count
from typing import Literal

from pydantic import PositiveInt

from unifork.images import png
from unifork.shapes.language import class_name, crop_caption, full_caption
from unifork.shapes.questions import conversations
from unifork.shapes.world import SINGLE_KINDS, Draws, Split, draw, scene
from unifork.shards.task import Slice
from unifork.sources import Row, Source, SourceOptions

WORLD_VERSION = 1
"""Raise when the same seed and number would give another row."""


class ShapesOptions(SourceOptions):
    """What a card says of the world."""

    scenes: Literal["all", "single"] = "all"
    """`single` yields images of one object only, all with a class name, in the place of ImageNet; the numbers
    then mean other scenes."""
    corrupt_every: PositiveInt | None = None
    """N cuts the image of every Nth row in half, so that the filter has something to find; width, height and texts
    stay those of the whole image, the hash is that of the bytes delivered."""
    split: Split = "train"
    """Which compositions may occur."""


def slices(_options: ShapesOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards without end."""
    return (Slice(start, start + shard_rows) for start in count(0, shard_rows))


def rows(options: ShapesOptions, piece: Slice, seed: int) -> Iterator[Row]:
    """Rows `start` to `stop - 1`."""
    for index in range(piece.start, piece.stop):
        damaged = options.corrupt_every is not None and (index + 1) % options.corrupt_every == 0
        yield _row(seed, index, options.split, options.scenes == "single", damaged)


def _row(seed: int, index: int, split: Split, single: bool, damaged: bool) -> Row:
    kind = Draws("single", seed, split, index).pick(SINGLE_KINDS) if single else None
    this = scene(seed, index, split, kind, alone=single)
    data = png(draw(this))
    data = data[: len(data) // 2 if damaged else None]
    return {
        "key": f"shapes-{index:08d}",
        "image": data,
        "width": this.width,
        "height": this.height,
        "url": "",
        "sha256": hashlib.sha256(data).hexdigest(),
        "license": "CC0-1.0",
        "caption": crop_caption(this),
        "description": full_caption(this),
        "conversations": conversations(this),
        "class_name": class_name(this),
        "objects": json.dumps([thing._asdict() for thing in this.objects], separators=(",", ":")),
    }


SOURCE = Source(ShapesOptions, slices, rows, endless=True, seeded=True, version=WORLD_VERSION)
