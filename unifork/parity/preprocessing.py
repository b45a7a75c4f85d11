"""Pictures as the official code sees them: bytes, values of bytes, sums of whole tensors.

Shape suffixes: S side in pixels, C channels (RGB).
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unifork.errors import DataError
from unifork.image_tokenizer.model import to_tensor
from unifork.image_tokenizer.views import PAD_COLOUR, SMALLEST_SIDE, crop_view, pad_first_view, pad_view
from unifork.parity.comparison import Comparison

ITEM = "04_preprocess"
NUMBERS = "04_preprocess.json"
VIEW_OF = {"gen": crop_view, "und": pad_view, "und_infer_pad": pad_first_view}
"""The official names of the views; the last one is what official inference does."""
STATISTICS = {
    "mean": lambda values_CSS: values_CSS.mean(),
    "std": lambda values_CSS: values_CSS.std(),
    "float32_sum": lambda values_CSS: values_CSS.sum(),
}
SUMMED = 1e-6
"""Tolerance of numbers summed in float64, in whatever order."""


def comparisons(folder: Path) -> Iterator[Comparison]:
    """Every tensor of 04_preprocess.npz, bit for bit, and the numbers of 04_preprocess.json.

    Raises FileNotFoundError, KeyError or DataError for a folder of another layout.
    """
    notes = json.loads((folder / f"{ITEM}.json").read_text())["notes"]
    expected = np.load(folder / f"{ITEM}.npz")
    size, left = notes["image_size"], set(expected.files) - {"lut"}
    yield _number("background_color", notes["background_color"], PAD_COLOUR)
    yield _number("min_size", notes["min_size"], SMALLEST_SIDE)
    values_256 = to_tensor(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)).reshape(-1)
    yield Comparison(ITEM, "lut", torch.from_numpy(expected["lut"]), values_256)
    for image, facts in notes["images"].items():
        for variant, view in VIEW_OF.items():
            bytes_SSC = view(Image.open(folder / "images" / f"{image}.png"), size, None)
            values_CSS = to_tensor(bytes_SSC[None])[0]
            name = f"{image}.{variant}"
            actual: dict[str, Tensor] = {"uint8": torch.from_numpy(np.moveaxis(bytes_SSC, -1, 0).copy())}
            actual["float32_stride4"] = values_CSS[:, ::4, ::4].contiguous()
            for kind, tensor in actual.items():
                if f"{name}.{kind}" in left:
                    left.remove(f"{name}.{kind}")
                    yield Comparison(ITEM, f"{name}.{kind}", torch.from_numpy(expected[f"{name}.{kind}"]), tensor)
            for kind in STATISTICS.keys() & facts.get(variant, {}).keys():
                number = float(STATISTICS[kind](values_CSS.double()))
                yield _number(f"{name}.{kind}", facts[variant][kind], number, SUMMED)
    if left:
        raise DataError(f"{ITEM}.npz: tensors of unknown meaning: {', '.join(sorted(left))}")


def _number(name: str, expected: object, actual: object, absolute: float = 0.0) -> Comparison:
    wanted, found = (torch.tensor(value, dtype=torch.float64).reshape(-1) for value in (expected, actual))
    return Comparison(NUMBERS, name, wanted, found, absolute)
