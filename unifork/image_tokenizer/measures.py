"""How good codes are: what they lose of an image, and how hard they are to learn.

In: pixels or codes. Out: plain numbers for the report. A language model learns codes best when few
different ones occur and each follows from those before it, so beside use and perplexity of each depth this gives
the entropy of all codes of a position together, in bits.

Shape suffixes: B images, S side in pixels, C channels (RGB), N positions, D code depth, M vectors,
K different values.
"""

import numpy as np
from typing_extensions import TypedDict


class DepthUse(TypedDict):
    """Use of the codebook at one depth of the code."""

    codebook_usage: int
    """Rows that occur."""
    perplexity: float
    """2 to the entropy."""


class CodeUse(TypedDict):
    """Use of the codebook."""

    codebook_usage: int
    bits_per_position: float
    """That the codes of a position carry together."""
    depths: list[DepthUse]


class Error(TypedDict):
    """What codes lose of images."""

    mean_absolute_levels: float
    psnr_db: float


class Measured(Error):
    """What is measured on some images."""

    codes: CodeUse


class ReadBack(TypedDict):
    """From how many images a reader reads the same before and after the codes."""

    same: int
    total: int


class Report(Measured):
    """What is measured on all images: the file `report.json` of a tokenizer."""

    groups: dict[str, Measured]
    """By data set and view."""
    images: int
    detector: dict[str, ReadBack]
    """Of data sets whose cards name a reader, by data set and view."""


REPORT = "report.json"


def reconstruction_error(original_BSSC: np.ndarray, drawn_BSSC: np.ndarray) -> Error:
    """Mean absolute difference in gray levels, and the mean over images of the PSNR in dB."""
    difference_BSSC = original_BSSC.astype(np.float64) - drawn_BSSC.astype(np.float64)
    square_B = np.maximum((difference_BSSC**2).mean(axis=(1, 2, 3)), 1e-3)
    return {
        "mean_absolute_levels": float(np.abs(difference_BSSC).mean()),
        "psnr_db": float((10 * np.log10(255**2 / square_B)).mean()),
    }


def code_use(codes_BND: np.ndarray) -> CodeUse:
    """Use of the codebook, in all and per depth, and how many bits the codes of a position carry together."""
    codes_MD = codes_BND.reshape(-1, codes_BND.shape[-1])
    counts = [np.unique(codes_M, return_counts=True)[1] for codes_M in codes_MD.T]
    return {
        "codebook_usage": int(np.unique(codes_MD).size),
        "bits_per_position": _bits(np.unique(codes_MD, axis=0, return_counts=True)[1]),
        "depths": [{"codebook_usage": len(counts_K), "perplexity": 2 ** _bits(counts_K)} for counts_K in counts],
    }


def _bits(counts_K: np.ndarray) -> float:
    """Entropy in bits of how often each value occurs."""
    share_K = counts_K / counts_K.sum()
    return float(-(share_K * np.log2(share_K)).sum())
