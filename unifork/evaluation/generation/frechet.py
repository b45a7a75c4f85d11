"""The Frechet distance of two sets of features: rows go in, the distance of the Gaussians around them comes out.

Shape suffixes: N images, D features.
"""

from collections.abc import Iterable

import numpy as np


def moments(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of at least two rows, the latter over N - 1; in float64."""
    rows_ND = features_ND.astype(np.float64)
    return rows_ND.mean(axis=0), np.atleast_2d(np.cov(rows_ND, rowvar=False))


def distances(
    mean_D: np.ndarray, covariance_DD: np.ndarray, others: Iterable[tuple[np.ndarray, np.ndarray]]
) -> list[float]:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) from one to each of others, by mean and covariance.

    By eigenvalues: no root of a product, which may be singular, is needed.
    """
    values_D, vectors_DD = np.linalg.eigh(np.asarray(covariance_DD, dtype=np.float64))
    root_DD, found = (vectors_DD * np.sqrt(values_D.clip(0))) @ vectors_DD.T, []
    for other_D, other_DD in others:
        shared = np.sqrt(np.linalg.eigvalsh(root_DD @ other_DD @ root_DD).clip(0)).sum()
        apart_D = np.asarray(mean_D, dtype=np.float64) - other_D
        found.append(float(apart_D @ apart_D + np.trace(covariance_DD) + np.trace(other_DD) - 2 * shared))
    return found
