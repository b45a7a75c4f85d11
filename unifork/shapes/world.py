"""The world `shapes`: (seed, index, split) goes in, a scene comes out, and `draw` generates it.

Flat-colored shapes lie on a lattice of 16-pixel cells. A base image is 48x48 pixels, 3x3 cells;
about a third of the images are 96x48 or 48x96, whose center crop is such a base image and whose
outer cells hold more objects, so that the two views of an image show different things. Why so
regular: a small tokenizer with 8-pixel patches sees each object as exactly 2x2 patches in the crop,
and as 2x2 quarter-filled patches in the padded view of a wide image (which halves it), so that a
small model trained for minutes can learn the world, while telling shape, color, number and place
apart stays a real task.

A scene is a pure function of its arguments: all draws come from Philox keyed by them. The kinds are
GenEval's six. Some compositions never occur in the splits `train` and `seen`, and at least one of
them occurs in every scene of `held_out`.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from PIL import Image

from unifork.config import read_yaml

Split = Literal["train", "seen", "held_out"]
"""`seen` draws from the compositions of `train`, under other keys; `held_out` from the others."""
ASKED_SPLITS: tuple[Split, ...] = ("seen", "held_out")
"""Those that benchmarks ask for."""

Kind = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""GenEval's six, by GenEval's names."""

SINGLE_KINDS: tuple[Kind, ...] = ("single_object", "colors")

_WORLD = read_yaml(Path(__file__).with_suffix(".yaml"))
SHAPES: list[str] = _WORLD["shapes"]
COLORS: dict[str, tuple[int, ...]] = {name: tuple(color) for name, color in _WORLD["colors"].items()}
GROUNDS: list[list[int]] = _WORLD["grounds"]
RELATIONS: dict[str, list[int]] = _WORLD["relations"]

CELL = 16
"""Side of a lattice cell in pixels."""
SIZE = 14
"""Side of every object in pixels; the gap keeps neighbours of one color apart."""
CROP = 48
"""Short side of every image, and side of its center crop."""
LONG = 96
"""Long side of wide and tall images; the crop begins 24 pixels in, the outer cells lie at 8 and 72."""
MOST = 4
"""Most objects in an image."""

HELD_OUT_COLORS, HELD_OUT_COUNTS = ({*map(tuple, _WORLD["held_out"][kind])} for kind in ("colors", "counts"))
HELD_OUT_PAIRS = {*map(frozenset, _WORLD["held_out"]["pairs"])}
"""Compositions that training never shows."""

Item = TypeVar("Item")


class Draws:
    """A stream of draws keyed by a few words and numbers; equal keys give equal streams on every machine."""

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        words = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
        self._bits = np.random.Philox(key=np.array(words, dtype=np.uint64))

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1; only raw bits are used, which NumPy promises to keep."""
        return int(self._bits.random_raw()) % limit

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in a drawn order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(len(left))]

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different items in a drawn order."""
        return self.shuffled(items)[:count]


class Object(NamedTuple):
    """A shape of one color; the box is (left, top, right, bottom) in pixels, right and bottom outside."""

    shape: str
    color: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """What an image shows. The objects of the center crop come first, in the order in which the kind means them."""

    seed: int
    index: int
    split: Split
    kind: Kind
    width: int
    height: int
    ground: int
    objects: tuple[Object, ...]


def scene(seed: int, index: int, split: Split, kind: Kind | None = None, *, alone: bool = False) -> Scene:
    """The scene under a key. `kind` None draws one; `alone` leaves out the objects outside the crop."""
    draws = Draws("scene", seed, split, index, kind or "any", int(alone))
    drawn: Kind = draws.pick(KINDS) if kind is None else kind
    want = split == "held_out"
    while held_out(inner := _inner(drawn, draws)) != want:
        pass
    wide = len(inner) < MOST and draws.below(100) < 36
    tall = wide and draws.below(2) == 1
    outer: list[Any] = []
    while wide and not alone and held_out(inner + (outer := _outer(MOST - len(inner), draws))) != want:
        pass
    start, margin = ((LONG - CROP) // 2 if wide else 0), (CELL - SIZE) // 2
    corners = [(shape, color, (start + CELL * i, CELL * j)) for shape, color, (i, j) in inner] + outer
    objects = []
    for shape, color, (x, y) in corners:
        left, top = (y + margin, x + margin) if tall else (x + margin, y + margin)
        objects.append(Object(shape, color, (left, top, left + SIZE, top + SIZE)))
    sides = (CROP, LONG) if tall else (LONG, CROP) if wide else (CROP, CROP)
    return Scene(seed, index, split, drawn, *sides, draws.below(len(GROUNDS)), tuple(objects))


def draw(scene: Scene) -> Image.Image:
    """The image of a scene: RGB, no antialiasing, so that it holds few distinct patches and reads back exactly."""
    pixels = np.empty((scene.height, scene.width, 3), dtype=np.uint8)
    pixels[:] = GROUNDS[scene.ground]
    for shape, color, (left, top, right, bottom) in scene.objects:
        pixels[top:bottom, left:right][mask(shape, right - left)] = COLORS[color]
    return Image.fromarray(pixels)


def crop_objects(scene: Scene) -> tuple[Object, ...]:
    """The objects that the center crop shows whole, in the crop's own pixels."""
    dx, dy = (scene.width - CROP) // 2, (scene.height - CROP) // 2
    moved = (Object(s, c, (x0 - dx, y0 - dy, x1 - dx, y1 - dy)) for s, c, (x0, y0, x1, y1) in scene.objects)
    return tuple(thing for thing in moved if min(thing.box) >= 0 and max(thing.box) <= CROP)


def relation(a: Object, b: Object) -> str | None:
    """Where `a` lies from `b` when they share a row or a column; None when they do not."""
    x, y = a.box[0] - b.box[0], a.box[1] - b.box[1]
    step = [(x > 0) - (x < 0), (y > 0) - (y < 0)]
    return next((name for name, direction in RELATIONS.items() if direction == step), None)


def mask(shape: str, size: int) -> np.ndarray:
    """The pixels of a shape in a square of `size` pixels, as booleans."""
    line = (np.arange(size) + 0.5) * 2 / size - 1
    x, y = np.meshgrid(line, line)
    masks = {
        "circle": x**2 + y**2 <= 1,
        "square": abs(x) <= 1,
        "triangle": abs(x) <= (y + 1) / 2 + 1 / size,  # the top line holds two pixels, not none
        "cross": np.minimum(abs(x), abs(y)) <= 0.3,
        "diamond": abs(x) + abs(y) <= 1,
    }
    return masks[shape]


def held_out(things: Sequence[tuple[str, str | None, object]]) -> bool:
    """Whether a set of objects, as (shape, color, place), holds a held-out composition."""
    counts = Counter(shape for shape, _, _ in things)
    return (
        any((color, shape) in HELD_OUT_COLORS for shape, color, _ in things)
        or any(frozenset(pair) in HELD_OUT_PAIRS for pair in combinations(counts, 2))
        or any(item in HELD_OUT_COUNTS for item in counts.items())
    )


def _inner(kind: Kind, draws: Draws) -> list[tuple[str, str, tuple[int, int]]]:
    """The objects of the crop as (shape, color, (column, row)), before anything is held out."""
    cells = [(i, j) for j in range(3) for i in range(3)]
    colors = tuple(COLORS)
    if kind in SINGLE_KINDS:
        return [(draws.pick(SHAPES), draws.pick(colors), draws.pick(cells))]
    if kind == "counting":
        shape, color = draws.pick(SHAPES), draws.pick(colors)
        return [(shape, color, cell) for cell in draws.some(cells, 2 + draws.below(3))]
    shapes = draws.some(SHAPES, 2)
    generates = draws.some(colors, 2) if kind == "color_attr" else [draws.pick(colors), draws.pick(colors)]
    places = draws.some(cells, 2)
    if kind == "position":  # one row or one column, so that exactly one relation holds
        places = draws.pick([[a, b] for a in cells for b in cells if a != b and (a[0] == b[0] or a[1] == b[1])])
    return list(zip(shapes, generates, places, strict=True))


def _outer(most: int, draws: Draws) -> list[tuple[str, str, tuple[int, int]]]:
    """One or two objects beside the crop of a wide image, as (shape, color, (left, top) of the cell)."""
    cells = [(x, CELL * j) for x in (8, LONG - 8 - CELL) for j in range(3)]
    places = draws.some(cells, 1 + draws.below(min(2, most)))
    return [(draws.pick(SHAPES), draws.pick(tuple(COLORS)), place) for place in places]
