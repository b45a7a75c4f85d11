"""How much of what images show survives their codes, for data sets whose images can be read exactly.

In: images before and after the codes, and a card that names a reader of such images. Out: how many of them read the
same. A reader is no part of the tokenizer and decides no code.

Shape suffixes: B images, S side in pixels, C channels (RGB).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from unifork.config import Card
from unifork.image_tokenizer.measures import ReadBack
from unifork.registry import Registry


@dataclass(frozen=True)
class Reader:
    """Reads what an image shows."""

    read: Callable[[Image.Image], Any]
    """What an image shows."""
    same: Callable[[Any, Any], bool]
    """Whether two readings agree."""


READERS: Registry[Reader] = Registry("reader", Reader, {})
"""Readers that cards name without a module."""


def read_back(card: Card, original_BSSC: np.ndarray, drawn_BSSC: np.ndarray) -> ReadBack:
    """From how many images the card's reader reads the same before and after the codes: `same` of `total`.

    Raises ConfigError for an unknown reader, and where the card names none.
    """
    reader = READERS.find(card.reader or "", f"card {card.name}: reader")
    pairs = [
        [reader.read(Image.fromarray(image)) for image in pair] for pair in zip(original_BSSC, drawn_BSSC, strict=True)
    ]
    return {"same": sum(reader.same(before, after) for before, after in pairs), "total": len(pairs)}
