"""Reads an image of the world back: an image goes in, its objects come out, the surest first.

A pixel belongs to an object when a palette color makes up more than half of it, the rest being
ground. Mixing is modelled because the border of a blurred black shape is gray, which is half-way
from white to black but near to nothing in the palette. Connected pixels are one object, unless
their box spans more than one cell: then neighbours grew together and are taken apart along the
lattice. The shape is the mask that overlaps most. What has no clear color or fits no shape is not
an object: an object half red and half green, or one cut by the border, is not seen. Padded
images are read too: the gray bars come off and the rest is enlarged to the world's scale.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from unifork.image_tokenizer.readers import Reader
from unifork.shapes.world import CELL, COLORS, CROP, SHAPES, SIZE, Object, mask

LEAST_FIT = 0.75
"""Least overlap (intersection over union) with a shape: half objects reach 0.7, blurred whole ones stay over 0.8."""
LEAST_SHARE = 0.7
"""Least share of an object's pixels that agree on its color."""
LEAST_PIXELS = 40
"""Fewer connected pixels are noise; the smallest shapes have about a hundred."""
BLURS = (0.0, 1.2, 1.8)
"""How blurred an image may be, as Gaussian radii in pixels: a blurred cross is nearer to a sharp diamond."""
LIGHT = 200
"""Pixels whose darkest channel is above this are ground for certain."""
LEAST_GROUND = 0.25
"""Least share of such pixels; an image with less, such as a black one, shows nothing of this world."""
GRAY, GRAY_TOLERANCE, LEAST_BAR = 127, 50, 6
"""The bars of padded images: their gray, how far a line's median may be off, least pixels of thickness."""


def detect(image: Image.Image) -> list[Object]:
    """The objects of an image, boxes in its own pixels, the best fitting ones first."""
    scaled, left, top, scale = _at_scale(image.convert("RGB"))
    labels = _labels(np.asarray(scaled, dtype=np.float32))
    found = []
    for y, x in _parts(labels > 0):
        color, (fit, shape) = _color(labels[y, x]), _shape(y, x)
        if color is not None and fit >= LEAST_FIT:
            x0, y0, x1, y1 = (round(int(side) / scale) for side in (x.min(), y.min(), x.max() + 1, y.max() + 1))
            found.append((fit, Object(shape, color, (x0 + left, y0 + top, x1 + left, y1 + top))))
    return [thing for _, thing in sorted(found, key=lambda pair: (-pair[0], pair[1].box))]


def same_objects(some: Iterable[Object], others: Iterable[Object], tolerance: float = CELL / 2) -> bool:
    """Whether two readings agree: the same shapes in the same colors at about the same places.

    `tolerance` is the largest distance of two centers along each axis, in pixels.
    """
    left = list(others)
    for thing in some:
        match = next((other for other in left if other[:2] == thing[:2] and _apart(thing, other) <= tolerance), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _apart(a: Object, b: Object) -> float:
    """The distance of two centers along the axis where it is larger."""
    return max(abs(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) / 2 for i in (0, 1))


def _at_scale(image: Image.Image) -> tuple[Image.Image, int, int, float]:
    """The image without gray bars and enlarged to a short side of CROP; how much came off; the enlargement."""
    pixels = np.asarray(image, dtype=np.int16)
    top, bottom = _bars(np.median(pixels, axis=1))
    left, right = _bars(np.median(pixels, axis=0)) if not top + bottom else (0, 0)
    inner = image.crop((left, top, image.width - right, image.height - bottom))
    scale = CROP / min(inner.size)
    if scale != 1:
        inner = inner.resize((round(inner.width * scale), round(inner.height * scale)), Image.Resampling.BICUBIC)
    return inner, left, top, scale


def _bars(medians: np.ndarray) -> tuple[int, int]:
    """How many lines are gray at the beginning and at the end, from their medians; zero when that is too few."""
    plain = np.flatnonzero((abs(medians - GRAY) > GRAY_TOLERANCE).any(axis=1))
    if len(plain) == 0:
        return 0, 0
    first, last = int(plain[0]), len(medians) - 1 - int(plain[-1])
    return (first, last) if min(first, last) >= LEAST_BAR else (0, 0)


def _labels(pixels: np.ndarray) -> np.ndarray:
    """For each pixel 0 for ground, or the number of its color counted from 1."""
    light = pixels[pixels.min(axis=2) > LIGHT]
    if len(light) < LEAST_GROUND * pixels[..., 0].size:
        return np.zeros(pixels.shape[:2], dtype=np.int64)
    ground = np.median(light, axis=0)
    offset = pixels - ground
    directions = np.array(list(COLORS.values()), dtype=np.float32) - ground
    share = np.clip(offset @ directions.T / (directions**2).sum(axis=1), 0, 1)
    rest = ((offset[:, :, None] - share[..., None] * directions) ** 2).sum(axis=3)
    best = rest.argmin(axis=2)
    covered = np.take_along_axis(share, best[..., None], axis=2)[..., 0]
    return np.where(covered > 0.5, best + 1, 0)


def _parts(foreground: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pixels of each object, as their rows and columns."""
    numbers, count = ndimage.label(foreground)
    for number in range(1, count + 1):
        y, x = np.nonzero(numbers == number)
        rows, columns = (max(1, round((np.ptp(line) + 1) / CELL)) for line in (y, x))
        cells = (y - y.min()) * rows // (np.ptp(y) + 1) * columns + (x - x.min()) * columns // (np.ptp(x) + 1)
        for cell in range(rows * columns):
            inside = cells == cell
            if inside.sum() >= LEAST_PIXELS:
                yield y[inside], x[inside]


def _color(labels: np.ndarray) -> str | None:
    """The color most of the pixels agree on, if enough of them do."""
    counts = np.bincount(labels, minlength=len(COLORS) + 1)
    best = int(counts.argmax())
    return list(COLORS)[best - 1] if counts[best] >= LEAST_SHARE * len(labels) else None


def _shape(y: np.ndarray, x: np.ndarray) -> tuple[float, str]:
    """The best overlap of pixels with any shape, both centerd, and that shape."""
    side = max(SIZE + 2, int(np.ptp(y)) + 1, int(np.ptp(x)) + 1)
    canvas = np.zeros((side, side), dtype=bool)
    canvas[tuple(line - line.min() + (side - np.ptp(line) - 1) // 2 for line in (y, x))] = True
    forms = _forms(side)
    fits = (forms & canvas).sum(axis=(2, 3)) / (forms | canvas).sum(axis=(2, 3))
    return float(fits.max()), SHAPES[int(fits.max(axis=1).argmax())]


@cache
def _forms(side: int) -> np.ndarray:
    """For every shape its forms in a square canvas: sharp and blurred, at the center and one pixel off it."""
    start, forms = (side - SIZE) // 2, []
    for shape in SHAPES:
        canvas = Image.new("L", (side, side))
        canvas.paste(Image.fromarray(mask(shape, SIZE) * np.uint8(255)), (start, start))
        blurred = [np.asarray(canvas.filter(ImageFilter.GaussianBlur(radius))) > 127 for radius in BLURS]
        offsets = product((-1, 0, 1), repeat=2)
        forms.append([np.roll(form, offset, (0, 1)) for offset in offsets for form in blurred])
    return np.array(forms)


READER = Reader(detect, same_objects)
