"""Kernel distance of two feature sets (KID)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ...data.errors import RepaError

if TYPE_CHECKING:
    from .moments import Rows

_CHUNK = 4096


def kernel_distance(
    features: Rows, reference: Rows, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> dict[str, float]:
    """Compute the kernel distance as the mean over random subsets.

    The unbiased squared maximum mean discrepancy under the kernel (x·y/D + 1)³ (Bińkowski et al., arXiv
    1801.01401). Subsets are drawn without replacement as torch-fidelity 0.4 draws them, each time first from
    the samples, then from the reference.

    Args:
        features: of the samples ``[N, D]``.
        reference: of real images ``[M, D]``.
        subsets: how many.
        subset_size: rows taken from each set.
        seed: of numpy's ``RandomState``.

    Returns:
        ``kid``, which can be negative, and ``kid_deviation``, the standard deviation over the subsets
        (divided by their number; it is no standard error).

    Raises:
        RepaError: a set is smaller than a subset, or the shapes do not fit.
    """
    samples, real = _checked(features, reference)
    if subsets < 1 or not 2 <= subset_size <= min(len(samples), len(real)):
        raise RepaError(
            f"{subsets} subsets of {subset_size} cannot be drawn from {len(samples)} samples and "
            f"{len(real)} reference images",
            f"take 2 to {min(len(samples), len(real))} rows a subset, or kid_all, which takes all rows once",
            field="subset_size",
        )
    generator = np.random.RandomState(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        first, second = (
            rows[torch.from_numpy(generator.choice(len(rows), subset_size, replace=False)).to(rows.device)]
            for rows in (samples, real)
        )
        values[i] = _discrepancy(first, second)
    return {"kid": float(values.mean()), "kid_deviation": float(values.std())}


def kernel_distance_of_all(features: Rows, reference: Rows) -> float:
    """Compute the kernel distance of all rows at once.

    The same estimator as `kernel_distance`, which is unbiased for sets of unequal size too.

    Args:
        features: of the samples ``[N, D]``, N at least 2.
        reference: of real images ``[M, D]``, M at least 2.

    Raises:
        RepaError: a set is too small, or the shapes do not fit.
    """
    return _discrepancy(*_checked(features, reference))


def _checked(features: Rows, reference: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    samples, real = (
        rows.detach() if isinstance(rows, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(rows))
        for rows in (features, reference)
    )
    for rows, name in ((samples, "features"), (real, "reference")):
        if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] != samples.shape[1]:
            raise RepaError(
                f"{name} of shape {list(rows.shape)} cannot be compared",
                "give [N, D] with at least 2 rows, both sets from one model",
                field=name,
            )
        if not bool(torch.isfinite(rows).all()):
            raise RepaError(f"{name} hold values that are not finite", "look at these images", field=name)
    return samples.double(), real.double().to(samples.device)


def _discrepancy(samples: torch.Tensor, real: torch.Tensor) -> float:
    """Return the unbiased squared discrepancy of two sets, diagonals left out within a set."""
    n, m = len(samples), len(real)
    within = sum(
        (_kernel_sum(rows, rows) - float(_kernel(rows.square().sum(dim=1), rows.shape[1]).sum()))
        / (len(rows) * (len(rows) - 1))
        for rows in (samples, real)
    )
    return within - 2 * _kernel_sum(samples, real) / (n * m)


def _kernel_sum(first: torch.Tensor, second: torch.Tensor) -> float:
    return sum(
        float(_kernel(first[start : start + _CHUNK] @ second.T, first.shape[1]).sum())
        for start in range(0, len(first), _CHUNK)
    )


def _kernel(products: torch.Tensor, width: int) -> torch.Tensor:
    shifted = products / width + 1
    return shifted * shifted * shifted
