"""Measures of how many directions a set of features uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import RepaError
from .moments import Moments, as_rows

if TYPE_CHECKING:
    from .moments import Rows


def vendi_score(features: Rows) -> float:
    """Compute the Vendi score (Friedman and Dieng, arXiv 2210.02410) under the cosine kernel.

    The exponential of the entropy of the eigenvalues of the cosine Gram matrix over N, an effective number of
    different images.

    Args:
        features: ``[N, D]``.

    Raises:
        RepaError: the features are not ``[N, D]``, not finite, or one of them is 0.
    """
    rows = as_rows(features)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        raise RepaError(
            f"the features of image {int(np.argmin(norms))} are all 0 and have no direction",
            "leave it out",
            field="features",
        )
    rows = rows / norms
    # XXᵀ and XᵀX have the same eigenvalues but for zeros: the smaller is taken
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    return float(np.exp(_entropy(np.linalg.eigvalsh(gram / len(rows)))))


def effective_rank(features: Rows | Moments) -> float:
    """Compute the effective rank of centred features (Roy and Vetterli, "The effective rank", 2007).

    The exponential of the entropy of the singular values, scaled to a sum of 1. It is 1 where all features
    lie on a line, and D where they spread evenly over all channels.

    Args:
        features: ``[N, D]``, or their moments.

    Returns:
        The rank, from 1; 0 where all rows are equal.

    Raises:
        RepaError: the features are not ``[N, D]`` or not finite.
    """
    if isinstance(features, Moments):
        gram = features.covariance
    else:
        rows = as_rows(features)
        centred = rows - rows.mean(axis=0)
        gram = centred @ centred.T if len(rows) < rows.shape[1] else centred.T @ centred
    eigenvalues = np.linalg.eigvalsh(gram)
    # below the rounding of the largest there is noise, whose roots would count
    floor = eigenvalues[-1] * len(gram) * np.finfo(np.float64).eps
    values = np.sqrt(eigenvalues[eigenvalues > floor])
    return float(np.exp(_entropy(values / values.sum()))) if len(values) else 0.0


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())
