"""How alike two models see the same images (CKA and CKNNA, as in the platonic-representation paper)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ...data.errors import RepaError

if TYPE_CHECKING:
    from torch import Tensor

    from .moments import Rows

_EPSILON = 1e-6
"""Added to the denominator by the published program; CKNNA of a set with itself is a little under 1 by it."""


def cknna(first: Rows, second: Rows, *, k: int = 10, normalise: bool = True) -> float:
    """Compute the centred kernel alignment over mutual nearest neighbours (Huh et al., arXiv 2405.07987).

    HSIC over pairs of images that are among each other's k nearest in both sets, unbiased (Song et al.,
    "Feature selection via dependence maximization", 2012), over the root of the two sets' own. REPA's
    appendix prints another order of the same steps, which gives a number 0.002 away.

    Args:
        first: features of N images ``[N, D]``.
        second: of the same images in the same order ``[N, E]``.
        k: how many neighbours; 10 in REPA.
        normalise: scale each row to length 1 first, as both papers do.

    Raises:
        RepaError: the sets do not fit each other, or k does not fit N.
    """
    kernels = [_kernel(rows) for rows in _checked(first, second, normalise)]
    n = len(kernels[0])
    if not 1 <= k < n:
        raise RepaError(f"{n} images have no {k} neighbours each", f"take 1 to {n - 1}", field="k")
    masks = [_nearest(kernel, k) for kernel in kernels]
    both = masks[0] * masks[1]
    shared = _hsic(both * kernels[0], both * kernels[1])
    own = [_hsic(mask * kernel, mask * kernel) for mask, kernel in zip(masks, kernels, strict=True)]
    return _quotient(shared, own)


def cka(first: Rows, second: Rows, *, unbiased: bool = False, normalise: bool = True) -> float:
    """Compute the centred kernel alignment with linear kernels (Kornblith et al., arXiv 1905.00414).

    Args:
        first: features of N images ``[N, D]``.
        second: of the same images in the same order ``[N, E]``.
        unbiased: take the unbiased HSIC, which does not grow with D where N is small.
        normalise: scale each row to length 1 first.

    Raises:
        RepaError: the sets do not fit each other.
    """
    kernels = [_kernel(rows) for rows in _checked(first, second, normalise)]
    if unbiased:
        return _quotient(_hsic(*kernels), [_hsic(kernel, kernel) for kernel in kernels])
    centred = [_centred(kernel) for kernel in kernels]
    shared, *own = (float((centred[i] * centred[j]).sum()) for i, j in ((0, 1), (0, 0), (1, 1)))
    return _quotient(shared, own)


def _quotient(shared: float, own: list[float]) -> float:
    return shared / (float(np.sqrt(max(own[0], 0.0) * max(own[1], 0.0))) + _EPSILON)


def _checked(first: Rows, second: Rows, normalise: bool) -> list[Tensor]:
    sets = []
    for rows, name in ((first, "first"), (second, "second")):
        array = rows if isinstance(rows, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(rows))
        values = array.detach()
        if values.ndim != 2 or len(values) < 4 or len(values) != len(first):
            raise RepaError(
                f"features of shapes {list(first.shape)} and {list(second.shape)} cannot be compared",
                "give [N, D] of the same images, at least 4",
                field=name,
            )
        if not bool(torch.isfinite(values).all()):
            raise RepaError("features hold values that are not finite", "look at these images", field=name)
        # in float32 neighbours at equal distance could change places
        values = values.double()
        sets.append(F.normalize(values, dim=1) if normalise else values)
    return sets


def _kernel(rows: Tensor) -> Tensor:
    return rows @ rows.T


def _nearest(kernel: Tensor, k: int) -> Tensor:
    """Return 1 where a column is one of a row's k largest, the row itself left out, ``[N, N]``."""
    others = kernel.clone().fill_diagonal_(-torch.inf)
    return torch.zeros_like(kernel).scatter_(1, others.topk(k, dim=1).indices, 1.0)


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(dim=0, keepdim=True) - kernel.mean(dim=1, keepdim=True) + kernel.mean()


def _hsic(first: Tensor, second: Tensor) -> float:
    """Return the unbiased HSIC of two kernels, which need not be symmetric."""
    n = len(first)
    first, second = (kernel.clone().fill_diagonal_(0) for kernel in (first, second))
    trace = float((first * second.mT).sum())
    sums = float(first.sum()) * float(second.sum()) / ((n - 1) * (n - 2))
    product = 2 * float(first.sum(dim=0) @ second.sum(dim=1)) / (n - 2)
    return (trace + sums - product) / (n * (n - 3))
