"""The world as a source of rows: a range of numbers goes in, rows as every other source yields them come out.

Row number `index` is always the same, whatever range it is asked for in: its bytes and texts are a
function of (seed, index) and of the installed Pillow, whose PNG compression decides the bytes.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args

from unifork.errors import ConfigError, unknown
from unifork.shapes.language import class_name, conversations, crop_caption, full_caption
from unifork.shapes.world import SINGLE_KINDS, SPLITS, Draws, Split, draw, scene

WORLD_VERSION = 1
"""Raise when the same options and seed would give other rows."""

Scenes = Literal["all", "single"]


def rows(
    seed: int,
    start: int,
    stop: int,
    *,
    scenes: Scenes = "all",
    corrupt_every: int | None = None,
    split: Split = "train",
) -> Iterator[dict[str, Any]]:
    """Rows `start` to `stop - 1`.

    scenes: `single` yields pictures of one object only, all with a class name, in the place of ImageNet;
    the numbers then mean other scenes.
    corrupt_every: N cuts the picture of every Nth row in half, so that the filter has something to find;
    width, height and texts stay those of the whole picture, the hash is that of the bytes delivered.
    """
    if scenes not in get_args(Scenes):
        raise unknown("choice of scenes", str(scenes), get_args(Scenes), "source 'shapes'")
    if split not in SPLITS:
        raise unknown("split", str(split), SPLITS, "source 'shapes'")
    if corrupt_every is not None and corrupt_every < 1:
        raise ConfigError(f"source 'shapes': corrupt_every is {corrupt_every}; allowed are whole numbers from 1")
    for index in range(start, stop):
        damaged = corrupt_every is not None and (index + 1) % corrupt_every == 0
        yield _row(seed, index, split, scenes == "single", damaged)


def _row(seed: int, index: int, split: Split, single: bool, damaged: bool) -> dict[str, Any]:
    kind = Draws("single", seed, split, index).pick(SINGLE_KINDS) if single else None
    this = scene(seed, index, split, kind, alone=single)
    buffer = io.BytesIO()
    draw(this).save(buffer, "PNG")
    data = buffer.getvalue()
    if damaged:
        data = data[: len(data) // 2]
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
