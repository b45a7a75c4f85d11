"""How good codes are: what they lose of an image, and how hard they are to learn.

In: pixels or codes. Out: plain numbers for the report. A language model learns codes best when few
different ones occur and each follows from those before it, so beside use and perplexity of each depth this gives
the entropy of all codes of a position together, in bits.

Shape suffixes: B images, S side in pixels, C channels (RGB), N positions, D code depth, M vectors,
K different values.
"""

from typing import Any

import numpy as np


def reconstruction_error(original_BSSC: np.ndarray, drawn_BSSC: np.ndarray) -> dict[str, float]:
    """Mean absolute difference in gray levels, and the mean over images of the PSNR in dB."""
    difference_BSSC = original_BSSC.astype(np.float64) - drawn_BSSC.astype(np.float64)
    square_B = np.maximum((difference_BSSC**2).mean(axis=(1, 2, 3)), 1e-3)
    return {
        "mean_absolute_levels": float(np.abs(difference_BSSC).mean()),
        "psnr_db": float((10 * np.log10(255**2 / square_B)).mean()),
    }


def code_use(codes_BND: np.ndarray) -> dict[str, Any]:
    """Use of the codebook, in all and per depth, and how many bits the codes of a position carry together.

    codebook_usage: rows that occur; perplexity: 2 to the entropy.
    """
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
