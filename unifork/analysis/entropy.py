"""Conditional entropy of token sequences, as the Uni-X paper compares languages and image codes (its section 3.1).

In: sequences of ids. Out: H1, H2, H3 in bits: how uncertain a token is after the 0, 1, 2 tokens before it, with the
frequencies of the sequence itself. That underestimates: the more, the longer the context and the fewer the tokens.
Sequences are therefore cut to equal lengths before they are compared.

Shape suffixes: T tokens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unifork.analysis.documents import drawn
from unifork.errors import DataError

ORDERS = 3


def conditional_entropy(ids_T: np.ndarray, n: int, whole: bool = False) -> float:
    """-sum p(n-gram) log2(count(n-gram) / count(its first n - 1)), n from 1; nan for fewer tokens than n.

    whole: prefixes are counted in the whole sequence and not in its n-grams, which is one more (released code).
    """
    if len(ids_T) < n:
        return float("nan")
    words, ids_T = np.unique(ids_T, return_inverse=True)
    labels = np.zeros(len(ids_T), np.int64)
    for length in range(1, n + 1):
        before, prefixes = labels, labels[: len(ids_T) - length + 1]
        grams = prefixes * len(words) + ids_T[length - 1 :]
        _, labels, counts = np.unique(grams, return_inverse=True, return_counts=True)
    return float(np.log2(np.bincount(before if whole else prefixes)[prefixes] / counts[labels]).mean())


def entropies(sequences: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Everything that is written as `entropy.json`: H1 to H3 of sequences, all cut to the shortest that is there."""
    lengths = {name: len(ids_T) for name, ids_T in sequences.items() if len(ids_T)}
    if not lengths:
        raise DataError("no tokens to count: the documents are empty")
    shortest = min(lengths.values())
    found = {
        name: [conditional_entropy(sequences[name][:shortest], n) for n in range(1, ORDERS + 1)] for name in lengths
    }
    return {"tokens": shortest, "available": lengths, "prefixes": "of the n-grams",
            "documents": "one after the other, n-grams cross their borders", "bits": found}  # fmt: skip


def figure(found: dict[str, Any]) -> str:
    """Bits over n, a curve for each sequence, as SVG."""
    curves = [{"x": range(1, len(bits) + 1), "y": bits, "label": name} for name, bits in found["bits"].items()]
    return drawn(curves, ("n", "bits"))
