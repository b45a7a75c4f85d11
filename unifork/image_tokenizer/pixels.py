"""Bytes of views as the network reads them, and back.

In: uint8 pixels (B, S, S, C). Out: float32 (B, C, S, S) from -1 to 1; and back.

Shape suffixes: B pictures, S side of the view, C channels (RGB).
"""

import numpy as np
import torch
from torch import Tensor


def to_tensor(pixels_BSSC: np.ndarray) -> Tensor:
    """Bytes as the encoder reads them: float32 (B, C, S, S), from -1 to 1.

    A table of 256 values, made in the official order: times 1/255 in float64, rounded to float32,
    minus 0.5, over 0.5. (Times a float32 1/255 gives other last bits.)
    """
    values_BSSC = _VALUE_OF_BYTE[pixels_BSSC]
    return torch.from_numpy(np.ascontiguousarray(values_BSSC.transpose(0, 3, 1, 2)))


def to_bytes(pixels_BCSS: Tensor) -> np.ndarray:
    """What the decoder drew, about -1 to 1, as bytes (B, S, S, C)."""
    bytes_BCSS = ((pixels_BCSS.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(bytes_BCSS.permute(0, 2, 3, 1).cpu().numpy())


_VALUE_OF_BYTE = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
