"""How good codes are: what they lose of a picture, and how hard they are to learn.

In: pixels or codes. Out: plain numbers for the report. A language model learns codes best when few
different ones occur and each follows from those before it, so beside use and perplexity this gives
the entropy of each depth given the depths before it at the same position, in bits.

Shape suffixes: B pictures, S side in pixels, C channels (RGB), N positions, D code depth, M vectors.
"""

from typing import Any

import numpy as np


def reconstruction_error(original_BSSC: np.ndarray, drawn_BSSC: np.ndarray) -> dict[str, float]:
    """Mean absolute difference in grey levels, and the mean over pictures of the PSNR in dB."""
    difference_BSSC = original_BSSC.astype(np.float64) - drawn_BSSC.astype(np.float64)
    square_B = np.maximum((difference_BSSC**2).mean(axis=(1, 2, 3)), 1e-3)
    return {
        "mean_absolute_levels": float(np.abs(difference_BSSC).mean()),
        "psnr_db": float((10 * np.log10(255**2 / square_B)).mean()),
    }


def code_use(codes_BND: np.ndarray, codebook_size: int) -> dict[str, Any]:
    """Use of the codebook per depth, and how many bits the codes carry.

    rows_used: rows that occur; perplexity: 2 to the entropy; conditional_bits: entropy given the
    depths before at the same position; distinct_positions: different tuples of D codes.
    """
    codes_MD = codes_BND.reshape(-1, codes_BND.shape[-1]).astype(np.int64)
    depths, previous_bits = [], 0.0
    for depth in range(codes_MD.shape[1]):
        alone = np.bincount(codes_MD[:, depth], minlength=codebook_size)
        prefix = np.unique(codes_MD[:, : depth + 1], axis=0, return_counts=True)[1]
        prefix_bits = _bits(prefix)
        depths.append(
            {
                "rows_used": int((alone > 0).sum()),
                "perplexity": float(2 ** _bits(alone)),
                "conditional_bits": prefix_bits - previous_bits,
            }
        )
        previous_bits = prefix_bits
    return {
        "rows_used": int(np.unique(codes_MD).size),
        "distinct_positions": int(np.unique(codes_MD, axis=0).shape[0]),
        "bits_per_position": previous_bits,
        "depths": depths,
    }


def _bits(counts: np.ndarray) -> float:
    """Entropy in bits of a table of counts."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())
