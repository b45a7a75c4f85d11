"""Images as the official code sees them: bytes, values of bytes, sums of whole tensors.

Shape suffixes: S side in pixels, C channels (RGB).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.parity.comparison import Comparison
from unifork.errors import DataError
from unifork.image_tokenizer.model import to_tensor
from unifork.images import PAD_COLOR, SMALLEST_SIDE, crop_view, pad_first_view, pad_view

ITEM = "04_preprocess"
NUMBERS = "04_preprocess.json"
VIEW_OF = {"gen": crop_view, "und": pad_view, "und_infer_pad": pad_first_view}
"""The official names of the views; the last one is what official inference does."""
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "std": torch.std, "float32_sum": torch.sum}
SUMMED = 1e-6
"""Tolerance of numbers summed in float64, in whatever order."""


def comparisons(folder: Path) -> Iterator[Comparison]:
    """Every tensor of 04_preprocess.npz, bit for bit, and the numbers of 04_preprocess.json.

    Raises FileNotFoundError, KeyError or DataError for a folder of another layout.
    """
    notes = json.loads((folder / f"{ITEM}.json").read_text())["notes"]
    expected = np.load(folder / f"{ITEM}.npz")
    yield _number("background_color", notes["background_color"], PAD_COLOR)
    yield _number("min_size", notes["min_size"], SMALLEST_SIDE)
    computed = {"lut": to_tensor(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)).reshape(-1)}
    for image, facts in notes["images"].items():
        for variant, view in VIEW_OF.items():
            bytes_SSC = view(Image.open(folder / "images" / f"{image}.png"), notes["image_size"], None)
            values_CSS = to_tensor(bytes_SSC[None])[0]
            computed[f"{image}.{variant}.uint8"] = torch.from_numpy(np.moveaxis(bytes_SSC, -1, 0).copy())
            computed[f"{image}.{variant}.float32_stride4"] = values_CSS[:, ::4, ::4].contiguous()
            for kind in STATISTICS.keys() & facts.get(variant, {}).keys():
                number = float(STATISTICS[kind](values_CSS.double()))
                yield _number(f"{image}.{variant}.{kind}", facts[variant][kind], number, SUMMED)
    for name in sorted(computed.keys() & set(expected.files)):
        yield Comparison(ITEM, name, torch.from_numpy(expected[name]), computed[name])
    if unknown := set(expected.files) - computed.keys():
        raise DataError(f"{ITEM}.npz: tensors of unknown meaning: {', '.join(sorted(unknown))}")


def _number(name: str, expected: object, actual: object, absolute: float = 0.0) -> Comparison:
    wanted, found = (torch.tensor(value, dtype=torch.float64).reshape(-1) for value in (expected, actual))
    return Comparison(NUMBERS, name, wanted, found, absolute)
