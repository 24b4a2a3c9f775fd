"""Measures made of distances to nearest neighbours (precision, recall, density, coverage, authenticity)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .moments import Rows

CHUNK_ELEMENTS = 2**24
"""Most distances that are held at once."""


def precision_recall(features: Rows, reference: Rows, *, k: int = 3) -> dict[str, float]:
    """Compute improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991), exactly.

    A point's ball reaches to its k-th neighbour other than itself, the edge included. Precision is the share
    of samples in at least one ball of the reference, recall that of the reference in a ball of the samples.
    The published evaluator takes distances in float16, which moves the third digit.

    Args:
        features: of the samples ``[N, D]``.
        reference: of real images ``[M, D]``.
        k: which neighbour.

    Returns:
        ``precision`` and ``recall``.

    Raises:
        RepaError: a set has no k-th neighbour, the shapes do not fit, or values are not finite.
    """
    samples, real = _centred(features, reference, k)
    radii_real, radii_samples = _radii(real, k), _radii(samples, k)
    in_real = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    in_samples = torch.zeros(len(real), dtype=torch.bool, device=samples.device)
    for start, distances in _distances(samples, real):
        stop = start + len(distances)
        in_real[start:stop] = (distances <= radii_real).any(dim=1)
        in_samples |= (distances <= radii_samples[start:stop, None]).any(dim=0)
    return {"precision": _share(in_real), "recall": _share(in_samples)}


def density_coverage(features: Rows, reference: Rows, *, k: int = 5) -> dict[str, float]:
    """Compute precision, recall, density and coverage (Naeem et al., arXiv 2002.09797).

    Balls leave their edge out. Density is the mean number of reference balls around a sample over k, coverage
    the share of the reference with a sample in its own ball.

    Args:
        features: of the samples ``[N, D]``.
        reference: of real images ``[M, D]``.
        k: which neighbour a ball reaches to, other than the point itself.

    Returns:
        ``prdc_precision``, ``prdc_recall``, ``density`` and ``coverage``.

    Raises:
        RepaError: a set has no k-th neighbour, the shapes do not fit, or values are not finite.
    """
    samples, real = _centred(features, reference, k)
    radii_real, radii_samples = _radii(real, k), _radii(samples, k)
    around = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    in_samples = torch.zeros(len(real), dtype=torch.bool, device=samples.device)
    covered = torch.zeros_like(in_samples)
    for start, distances in _distances(samples, real):
        stop = start + len(distances)
        inside = distances < radii_real
        around[start:stop] = inside.sum(dim=1)
        covered |= inside.any(dim=0)
        in_samples |= (distances < radii_samples[start:stop, None]).any(dim=0)
    return {
        "prdc_precision": _share(around > 0),
        "prdc_recall": _share(in_samples),
        "density": float(around.double().mean()) / k,
        "coverage": _share(covered),
    }


def authenticity(features: Rows, reference: Rows) -> float:
    """Compute the percentage of samples that are no copies of a real image (AuthPct).

    A sample counts as authentic where it is farther from its nearest real image than that image is from its
    own nearest neighbour (Alaa et al., arXiv 2102.08921; Stein et al., arXiv 2306.04675).

    Args:
        features: of the samples ``[N, D]``.
        reference: of the images that were trained on ``[M, D]``, M at least 2.

    Raises:
        RepaError: the shapes do not fit, or values are not finite.
    """
    samples, real = _centred(features, reference, 1)
    own = _radii(real, 1)
    authentic = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    for start, distances in _distances(samples, real):
        nearest = distances.min(dim=1)
        authentic[start : start + len(distances)] = own[nearest.indices] < nearest.values
    return 100 * _share(authentic)


def _centred(features: Rows, reference: Rows, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both sets in float32 after subtraction of the reference's mean.

    Distances do not change, but a common offset would cost their float32 products digits.
    """
    sets = [_tensor(each) for each in (features, reference)]
    for rows, name in zip(sets, ("features", "reference"), strict=True):
        if rows.ndim != 2 or not 1 <= k < len(rows):
            raise RepaError(
                f"{name} of shape {list(rows.shape)} have no neighbour {k} a row",
                "give [N, D] with more rows than that",
                field=name,
            )
        if not bool(torch.isfinite(rows).all()):
            raise RepaError(f"{name} hold values that are not finite", "look at these images", field=name)
    samples, real = sets
    if samples.shape[1] != real.shape[1]:
        raise RepaError(
            f"features have {samples.shape[1]} channels, and those of the reference {real.shape[1]}",
            "take both from one model",
            field="reference",
        )
    mean = real.double().mean(dim=0)
    return (samples.double() - mean).float(), (real.double().to(samples.device) - mean).float()


def _tensor(rows: Rows) -> torch.Tensor:
    return rows.detach() if isinstance(rows, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(rows))


def _radii(rows: torch.Tensor, k: int) -> torch.Tensor:
    """Return the squared distance of each row to its k-th neighbour, float64 ``[N]``."""
    radii = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for start, distances in _distances(rows, rows):
        # the point itself, whose distance comes out as rounding noise, is no neighbour of its own
        own = torch.arange(len(distances), device=rows.device)
        distances[own, start + own] = torch.inf
        radii[start : start + len(distances)] = distances.kthvalue(k, dim=1).values
    return radii


def _distances(first: torch.Tensor, second: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the squared distances of some rows of the first set to all of the second.

    Products are taken in float32, norms in float64.

    Yields:
        The first row's number, and float64 ``[n, M]``, not negative.
    """
    norms_first, norms_second = (rows.double().square().sum(dim=1) for rows in (first, second))
    chunk = max(1, CHUNK_ELEMENTS // len(second))
    for start in range(0, len(first), chunk):
        with _whole_float32(first.device):
            products = first[start : start + chunk] @ second.T
        distances = products.double().mul_(-2).add_(norms_second)
        distances.add_(norms_first[start : start + chunk, None])
        yield start, distances.clamp_(min=0)


@contextmanager
def _whole_float32(device: torch.device) -> Iterator[None]:
    """Take products of float32 in float32, where the program around set something coarser."""
    backends: Any = torch.backends
    switch = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _share(hits: torch.Tensor) -> float:
    return int(hits.sum()) / len(hits)
