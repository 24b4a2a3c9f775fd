"""Fréchet distance of two feature sets (FID's formula, in any feature space)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def frechet_distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Compute the squared Fréchet distance of the normal distributions fitted to two feature sets.

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½) (Dowson and Landau, "The Fréchet distance between multivariate
    normal distributions", 1982), as FID uses it (Heusel et al., arXiv 1706.08500). Covariances are unbiased
    (divided by N − 1). The trace of the root is taken as the sum of the roots of the eigenvalues of
    Σ₁^½ Σ₂ Σ₁^½, which is symmetric: exact also when fewer samples than channels make the covariances
    singular, where a general matrix root returns complex noise.

    Args:
        first: features ``[N, D]``, N at least 2.
        second: features ``[M, D]``, M at least 2.

    Returns:
        The distance, in float64; 0 for equal sets up to rounding, never negative.

    Raises:
        ValueError: the shapes do not fit, or there are too few samples or non-finite values.
    """
    for features in (first, second):
        if features.ndim != 2 or features.shape[0] < 2:
            raise ValueError(f"features {features.shape} are not [N, D] with N at least 2")
        if not np.isfinite(features).all():
            raise ValueError("features hold values that are not finite")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features have {first.shape[1]} and {second.shape[1]} channels")
    mean_first, covariance_first = _moments(first)
    mean_second, covariance_second = _moments(second)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance_first)
    root = (eigenvectors * np.sqrt(eigenvalues.clip(min=0))) @ eigenvectors.T
    inner = root @ covariance_second @ root
    trace_of_root = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    shift = mean_first - mean_second
    distance = shift @ shift + np.trace(covariance_first) + np.trace(covariance_second) - 2 * trace_of_root
    return max(float(distance), 0.0)


def _moments(features: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean ``[D]`` and unbiased covariance ``[D, D]``, in float64."""
    values = np.asarray(features, dtype=np.float64)
    mean = values.mean(axis=0)
    centred = values - mean
    return mean, centred.T @ centred / (len(values) - 1)
