"""Conditional entropy of token sequences, as the Uni-X paper compares languages and image codes (its section 3.1).

In: documents. Out: H1, H2, H3 in bits of their text tokens and of their codes at each depth: how uncertain a token is
after the 0, 1, 2 tokens before it, with the frequencies of the sequence itself. That underestimates: the more, the
longer the context and the fewer the tokens. All sequences are therefore cut to the length of the shortest.

Shape suffixes: T tokens, N image positions, D code depth.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from unifork.analysis.runs import drawn
from unifork.batch import TEXT, Document
from unifork.config import Analysis
from unifork.errors import DataError

ORDERS = (1, 2, 3)


def conditional_entropy(ids_T: np.ndarray, n: int, whole: bool = False) -> float:
    """-sum p(n-gram) log2(count(n-gram) / count(its first n - 1 tokens)) of a sequence of at least n tokens.

    whole: prefixes are counted in the whole sequence, which has one more of them than n-grams (released code).
    """
    words, ids_T = np.unique(ids_T, return_inverse=True)
    labels = np.zeros(len(ids_T), np.int64)
    for length in range(1, n + 1):
        before, prefixes = labels, labels[: len(ids_T) - length + 1]
        grams = prefixes * len(words) + ids_T[length - 1 :]
        _, labels, counts = np.unique(grams, return_inverse=True, return_counts=True)
    return float(np.log2(np.bincount(before if whole else prefixes)[prefixes] / counts[labels]).mean())


def entropies(documents: Iterable[Document]) -> dict[str, Any]:
    """Everything that is written as `entropy.json`. Raises DataError where there are fewer tokens than n."""
    every = list(documents)
    parts = {"text": [document.text_ids_T[document.kinds_T == TEXT] for document in every]}
    images = {document.codes_ND.tobytes(): document.codes_ND for document in every if len(document.codes_ND)}
    for codes_ND in images.values():  # each once, in however many documents it is
        for depth, codes_N in enumerate(codes_ND.T):
            parts.setdefault(f"codes, depth {depth}", []).append(codes_N)
    sequences = {name: np.concatenate(part) for name, part in parts.items() if part}
    tokens = min(map(len, sequences.values()), default=0)
    if tokens < max(ORDERS):
        raise DataError(f"{len(every)} documents with {tokens} tokens of each kind; at least {max(ORDERS)} are needed")
    bits = {name: [conditional_entropy(ids_T[:tokens], n) for n in ORDERS] for name, ids_T in sequences.items()}
    return {"tokens": tokens, "prefixes": "of the n-grams", "n-grams": "cross borders of documents", "bits": bits}


def figure(found: dict[str, Any], _: Analysis) -> str:
    """Bits over n, a curve for each sequence, as SVG."""
    return drawn([{"x": ORDERS, "y": y, "label": name} for name, y in found["bits"].items()], "n", "bits")
