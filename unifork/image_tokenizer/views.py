"""What a task sees of an image: a square of bytes.

In: a Pillow image in any mode, the side S in pixels, and a matte (the color put behind transparent
pixels; None drops the alpha channel as the official code does). Out: uint8 pixels of shape (S, S, 3).

Bytes equal the official preprocessing's (tliby/UniFork: Pillow's bicubic filter, sizes truncated
after the same order of float operations), because codes of any other bytes are other codes. For
the same reason an EXIF rotation is not applied: the official code converts to RGB and no more.
Change PREPROCESSING_VERSION with any change of bytes; it is recorded with every shard of codes.

Shape suffixes: H height, W width, S side of the view, C channels (RGB).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from unifork.errors import DataError
from unifork.vocabulary import View

RGB = tuple[int, int, int]
MATTE = (255, 255, 255)
"""Behind transparent pixels of images that no card describes."""
Look = Callable[[Image.Image, int, RGB | None], np.ndarray]

PREPROCESSING_VERSION = "official-bicubic-1"

PAD_COLOR: RGB = (127, 127, 127)
"""The official background: int(0.5 * 255)."""

SMALLEST_SIDE = 14
"""The official `min_size`: a very thin image is widened to this many pixels."""

LARGEST_RESIZED_PIXELS = 89_478_485
"""Pillow's own limit for one image; a crop of a hair-thin image would be resized beyond it."""


def to_rgb(image: Image.Image, matte: RGB | None) -> Image.Image:
    """Any Pillow image as RGB.

    Transparent pixels are laid over `matte`; None drops the alpha channel, which shows whatever
    color hides below it. An image without a transparent pixel comes out the same for any matte.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        pixels = image.convert("RGBA")
    except (ValueError, OSError) as error:
        raise DataError(f"an image of mode {image.mode!r} and size {image.size} cannot become RGB: {error}") from None
    if matte is None or pixels.getchannel("A").getextrema()[0] == 255:
        return pixels.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", pixels.size, (*matte, 255)), pixels).convert("RGB")


def crop_view(image: Image.Image, size: int, matte: RGB | None) -> np.ndarray:
    """The shorter side resized to `size`, the center cut out: what generation learns to draw."""
    opaque = to_rgb(image, matte)
    scale = size / min(opaque.size)
    width, height = (max(int(side * scale), size) for side in opaque.size)
    resized = _resize(opaque, width, height)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def pad_view(image: Image.Image, size: int, matte: RGB | None) -> np.ndarray:
    """The longer side resized to `size`, the rest filled with gray: what understanding reads.

    This is the official training variant: resize, then pad.
    """
    opaque = to_rgb(image, matte)
    longer = max(opaque.size)
    width, height = (max(int(side / longer * size), SMALLEST_SIDE) for side in opaque.size)
    return np.asarray(_on_gray_square(_resize(opaque, width, height)))


def pad_first_view(image: Image.Image, size: int, matte: RGB | None) -> np.ndarray:
    """The official inference variant, which pads to a square first and resizes after; other bytes."""
    square = _on_gray_square(to_rgb(image, matte))
    return np.asarray(_resize(square, size, size))


VIEWS: dict[View, Look] = {"crop": crop_view, "pad": pad_view}
"""The views codes are made of; `unifork.vocabulary.VIEW_OF_TASK` says which task reads which."""

VARIANTS: dict[str, Look] = {"crop": crop_view, "pad": pad_view, "pad-first": pad_first_view}
"""All ways to see an image; what is not in VIEWS serves evaluation alone, no data set may ask for it."""


def declared(view: str, matte: RGB | None, batch_images: int, size: int, dtype: str) -> dict[str, Any]:
    """StrictModel data: all that decides the codes of an image beside the tokenizer and the machine."""
    return {
        "view": view,
        "matte": None if matte is None else list(matte),
        "preprocessing": PREPROCESSING_VERSION,
        "batch_shape": [batch_images, 3, size, size],
        "dtype": dtype,
    }


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    if width * height > LARGEST_RESIZED_PIXELS:
        raise DataError(
            f"an image of size {image.size} would be resized to {width}x{height}; "
            f"allowed are {LARGEST_RESIZED_PIXELS} pixels: it is too thin to be cropped"
        )
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _on_gray_square(image: Image.Image) -> Image.Image:
    """An image in the middle of a gray square of its longer side."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
