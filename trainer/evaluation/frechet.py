"""Fréchet distance of two feature sets (the formula of FID and sFID), and its limit for many samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import RepaError
from .moments import Moments, as_rows, moments_of

if TYPE_CHECKING:
    from .moments import Rows


def frechet_distance(first: Rows | Moments, second: Rows | Moments) -> float:
    """Compute the squared Fréchet distance of the normal distributions fitted to two feature sets.

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½) (Dowson and Landau, "The Fréchet distance between multivariate
    normal distributions", 1982), as FID uses it (Heusel et al., arXiv 1706.08500). Covariances are unbiased
    (divided by N − 1). The trace of the root is taken as the sum of the roots of the eigenvalues of
    Σ₁^½ Σ₂ Σ₁^½, which is symmetric: exact also when fewer samples than channels make the covariances
    singular, where a general matrix root returns complex noise.

    Args:
        first: features ``[N, D]``, N at least 2, or their moments.
        second: features ``[M, D]``, M at least 2, or their moments.

    Returns:
        The distance, in float64; 0 for equal sets up to rounding, never negative.

    Raises:
        RepaError: the shapes do not fit, or there are too few samples or non-finite values.
    """
    one = first if isinstance(first, Moments) else moments_of(first)
    two = second if isinstance(second, Moments) else moments_of(second)
    if len(one.mean) != len(two.mean):
        raise RepaError(
            f"features have {len(one.mean)} channels, and those of the reference {len(two.mean)}",
            "take both from one model",
            field="reference",
        )
    eigenvalues, eigenvectors = np.linalg.eigh(one.covariance)
    root = (eigenvectors * np.sqrt(eigenvalues.clip(min=0))) @ eigenvectors.T
    inner = root @ two.covariance @ root
    trace_of_root = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    shift = one.mean - two.mean
    distance = shift @ shift + np.trace(one.covariance) + np.trace(two.covariance) - 2 * trace_of_root
    return max(float(distance), 0.0)


def frechet_distance_at_infinity(
    features: Rows, reference: Rows | Moments, *, points: int = 15, smallest: int = 5000, seed: int = 0
) -> float:
    """Extrapolate the Fréchet distance to infinitely many samples.

    A line is fitted to the distances of subsets over 1/N, and its value at 0 is returned (Chong and Forsyth,
    "Effectively unbiased FID and Inception Score", arXiv 1911.07023). Subset sizes are spaced evenly from
    ``smallest`` to N, each subset is drawn anew without replacement.

    Args:
        features: of the samples ``[N, D]``.
        reference: features ``[M, D]`` of real images, or their moments.
        points: how many subset sizes.
        smallest: the smallest of them.
        seed: of the draws; the published programs have none.

    Returns:
        The intercept, in float64; it can be negative.

    Raises:
        RepaError: there are not more samples than the smallest subset has, or the arrays do not fit.
    """
    rows = as_rows(features)
    if points < 2 or smallest < 2 or len(rows) <= smallest:
        raise RepaError(
            f"{len(rows)} samples give no line through {points} subsets of at least {smallest}",
            "take more samples, or a smaller smallest subset",
            field="smallest",
        )
    target = reference if isinstance(reference, Moments) else moments_of(reference)
    generator = np.random.default_rng(seed)
    sizes = np.linspace(smallest, len(rows), points).astype(int)
    distances = [
        frechet_distance(rows[generator.choice(len(rows), size, replace=False)], target) for size in sizes
    ]
    return float(np.polynomial.Polynomial.fit(1 / sizes, distances, 1)(0.0))
