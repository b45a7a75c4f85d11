"""A few fixed images and their codes, which show whether a tokenizer still encodes as it did.

In: how to encode (bytes in, codes out) and what the last bits of codes depend on. Out:
`canaries.safetensors` (pixels as bytes, codes) and `canaries.json` (with what they were made) in the
tokenizer's directory. They are encoded again at every load, in one batch of the same shape: on the
same class of device and dtype every code must be equal; elsewhere last bits differ, so the share of
other codes is logged and bounded. The images are drawn here from a few formulas and stored as bytes,
so they depend on nobody's data and on no later change of the formulas.

Shape suffixes: B canaries, S side in pixels, C channels (RGB), N positions, D code depth.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from unifork.errors import IdentityError
from unifork.shards.manifest import write_json
from unifork.weights import check_fit, read_json, read_tensors

TENSORS_FILE = "canaries.safetensors"
FACTS_FILE = "canaries.json"
COUNT = 8
LARGEST_FLIP_RATE = 0.05
"""Share of codes that may differ on another device or dtype before the tokenizer is refused."""

Encode = Callable[[np.ndarray], Tensor]
"""Codes (B, N, D) of bytes (B, S, S, C)."""

logger = logging.getLogger(__name__)


def images(size: int) -> np.ndarray:
    """The canaries at side `size`: gradients, rings, stripes, flat shapes and smooth noise, (B, S, S, C) bytes."""
    y_SS, x_SS = np.mgrid[0:size, 0:size] / size
    drawn = []
    for index in range(COUNT):
        turn = 0.7 * index
        slope_SS = np.cos(turn) * x_SS + np.sin(turn) * y_SS
        radius_SS = np.hypot(x_SS - 0.3 - 0.05 * index, y_SS - 0.55)
        layers = (
            slope_SS,
            0.5 + 0.5 * np.sin((3 + index) * np.pi * slope_SS),
            0.5 + 0.5 * np.cos(18 * radius_SS + index),
            (radius_SS < 0.15 + 0.03 * index).astype(float),
            ((np.abs(x_SS - 0.6) < 0.2) & (np.abs(y_SS - 0.4) < 0.1 + 0.03 * index)).astype(float),
        )
        channels = [layers[(index + 2 * channel) % len(layers)] for channel in range(3)]
        drawn.append(np.stack(channels, axis=-1))
    pixels_BSSC: np.ndarray = (255 * np.clip(np.stack(drawn), 0, 1)).astype(np.uint8)
    return pixels_BSSC


def write(directory: Path, size: int, encode: Encode, here: Mapping[str, Any]) -> None:
    """Encode the canaries and store them with their codes; `here`: see `check`."""
    pixels_BSSC = images(size)
    save_file({"pixels": torch.from_numpy(pixels_BSSC), "codes": encode(pixels_BSSC)}, directory / TENSORS_FILE)
    write_json(directory / FACTS_FILE, {**here, "batch_shape": list(pixels_BSSC.shape)})


def check(directory: Path, encode: Encode, here: Mapping[str, Any]) -> float:
    """Encode the stored canaries again; the share of codes that differ. `here`: `device_class`, `dtype`, `libraries`.

    Raises IdentityError where any code differs on the device class and dtype they were made with, or
    more than LARGEST_FLIP_RATE elsewhere; CheckpointError where the files are missing or damaged.
    """
    path, facts = directory / TENSORS_FILE, read_json(directory / FACTS_FILE)
    tensors = read_tensors(path, ["pixels", "codes"])
    codes_BND, promised_BND = encode(tensors["pixels"].numpy()), tensors["codes"]
    check_fit(path, {"codes": tuple(promised_BND.shape)}, {"codes": tuple(codes_BND.shape)})
    flip_rate = float((codes_BND != promised_BND).double().mean())
    same_place = all(facts.get(key) == here[key] for key in ("device_class", "dtype"))
    allowed = 0.0 if same_place else LARGEST_FLIP_RATE
    before, now = (", ".join(str(given.get(key)) for key in here) for given in (facts, here))
    found = (
        f"{directory}: {flip_rate:.3%} of the canaries' codes differ, allowed are {allowed:.0%}; "
        f"made with {before}; encoded now with {now}"
    )
    if flip_rate > allowed:
        raise IdentityError(found)
    if not same_place:
        logger.warning(found)
    return flip_rate
