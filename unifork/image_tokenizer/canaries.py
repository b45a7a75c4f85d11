"""A few fixed pictures and their codes, which show whether a tokenizer still encodes as it did.

In: a tokenizer. Out: `canaries.safetensors` (pixels as bytes, codes) and `canaries.json` (where and
with what they were made) in its directory. They are encoded again at every load, in one batch of
the same shape: on the same class of device and dtype every code must be equal; elsewhere last bits
differ, so the share of other codes is logged and bounded. The pictures are drawn here from a few
formulas and stored as bytes, so they depend on nobody's data and on no later change of the formulas.

Shape suffixes: B canaries, S side in pixels, C channels (RGB), N positions, D code depth.
"""

import json
import logging
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unifork.errors import CheckpointError, IdentityError
from unifork.image_tokenizer.pixels import to_tensor

if TYPE_CHECKING:
    from unifork.image_tokenizer.model import ImageTokenizer

TENSORS_FILE = "canaries.safetensors"
FACTS_FILE = "canaries.json"
COUNT = 8
LARGEST_FLIP_RATE = 0.05
"""Share of codes that may differ on another device or dtype before the tokenizer is refused."""

logger = logging.getLogger(__name__)


def pictures(size: int) -> np.ndarray:
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


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the last bits of features, and so rare codes, depend on beside weights and batch shape."""
    return {
        "device_class": device_class(device),
        "dtype": str(dtype).removeprefix("torch."),
        "libraries": {name: version(name) for name in ("torch", "transformers", "pillow")},
    }


def device_class(device: torch.device) -> str:
    """The model of an accelerator, or a CPU's architecture and vector instructions."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def write(tokenizer: "ImageTokenizer", directory: Path) -> None:
    """Encode the canaries and store them with their codes."""
    pixels_BSSC = pictures(tokenizer.architecture.image_size)
    codes_BND = tokenizer.encode(to_tensor(pixels_BSSC)).cpu()
    save_file({"pixels": torch.from_numpy(pixels_BSSC), "codes": codes_BND}, directory / TENSORS_FILE)
    weight = tokenizer.post_quant_conv.weight
    facts = environment(weight.device, weight.dtype) | {"batch_shape": list(pixels_BSSC.shape)}
    (directory / FACTS_FILE).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def check(tokenizer: "ImageTokenizer", directory: Path) -> float:
    """Encode the stored canaries again; returns the share of codes that differ.

    Raises IdentityError where any differs on the device class and dtype they were made with, or
    more than LARGEST_FLIP_RATE elsewhere.
    """
    tensors, facts = _read(directory)
    weight = tokenizer.post_quant_conv.weight
    here = environment(weight.device, weight.dtype)
    codes_BND = tokenizer.encode(to_tensor(tensors["pixels"].numpy())).cpu()
    promised_BND = tensors["codes"]
    if codes_BND.shape != promised_BND.shape:
        raise IdentityError(
            f"{directory}: the canaries' codes are {tuple(codes_BND.shape)}, stored are {tuple(promised_BND.shape)}"
        )
    flip_rate = _flip_rate(codes_BND, promised_BND)
    same_place = all(facts.get(key) == here[key] for key in ("device_class", "dtype"))
    allowed = 0.0 if same_place else LARGEST_FLIP_RATE
    made = f"{facts.get('device_class')}, {facts.get('dtype')}, {facts.get('libraries')}"
    now = f"{here['device_class']}, {here['dtype']}, {here['libraries']}"
    if flip_rate > allowed:
        raise IdentityError(
            f"{directory}: {flip_rate:.2%} of the canaries' codes differ, allowed are {allowed:.0%}; "
            f"made with {made}; encoded now with {now}"
        )
    if not same_place:
        logger.warning(
            "%s: %.3f%% of the canaries' codes differ; made with %s; now %s", directory, 100 * flip_rate, made, now
        )
    return flip_rate


def _flip_rate(codes_BND: Tensor, promised_BND: Tensor) -> float:
    return float((codes_BND != promised_BND).double().mean())


def _read(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors = load_file(directory / TENSORS_FILE)
        facts = json.loads((directory / FACTS_FILE).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename or directory / TENSORS_FILE}: no such file; a tokenizer needs its canaries"
        ) from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{directory}: canaries are damaged: {error}") from None
    if not {"pixels", "codes"} <= tensors.keys() or not isinstance(facts, dict):
        raise CheckpointError(f"{directory}: canaries are damaged: expected the tensors pixels and codes")
    return tensors, facts
