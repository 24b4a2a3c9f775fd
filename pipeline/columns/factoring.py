"""Factors of the attention of one image, q′ and k′ of few bits for every head.

The logits of a head are S = q·k̃ᵀ, k̃ the keys less their mean. Over a data set their spectrum is flat, within
an image it is steep: so each image has a basis of its own, and nothing but the factors is stored. What counts
is the softmax P of S over the keys. To second order a change δ of the logits changes it by

    KL ≈ ½ Σ_j P_ij (δ_ij − Σ_j P_ij δ_ij)²   in row i,

so the factors are those that are near S where P is large:

1 *Subspace.* With weights v_j, the attention that key j receives on average, the best factors of rank r are
  the leading singular vectors of S·diag(√v). Two subspace iterations from the basis of the data set come
  near; they are products of Dh × Dh matrices (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4).
2 *Keys*, then *queries*: one step of conjugate gradients for the sum above itself, for each key with the
  queries fixed and for each query with the keys fixed, all of them at a time.
3 The components of a head are rounded in two groups, the first of them to int8, the others to int4, after a
  rotation of each group by one orthogonal matrix on both sides (see `truncation`), which spreads the
  components' magnitudes evenly. Keys are rounded before the step of the queries, which so takes back what
  rounding did to the keys.

The truncation by an image's own logits, weighted by the attention received, and both steps are ours.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...data.format.factor_layout import INT4_LARGEST, INT8_LARGEST
from ...data.format.factors import pack, places
from .slabs import head_slabs
from .truncation import centred, hartley

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...data.format.factor_layout import FactorLayout

ITERATIONS = 2
# of the largest magnitude: values beyond are clipped, which for normal numbers of so few steps costs less
# than the wider steps that the largest would ask for
_INT4_RANGE = 0.85
_JITTER = 1e-10  # of a diagonal of ones: where there are fewer directions than components
_LEAST_WEIGHT = 1e-3  # of the mean key's: one that no query looks at must not come to be looked at
_CACHED_NUMBERS = 1 << 18  # of an attention map, as float32 1 MiB
_FLOOR = 1e-8  # of the largest second moment: a component below has no part in any logit


def factorise(
    queries: Tensor, keys: Tensor, basis: Tensor, layout: FactorLayout, block: int, logit_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the packed factors of one block.

    Args:
        queries: float32 ``[B, H, T, Dh]``.
        keys: float32 ``[B, H, T, Dh]``.
        basis: of the data set, see `start_basis`, float64 ``[H, Dh, Dh]``.
        layout: of the cache.
        block: index on the axis L.
        logit_scale: of the teacher.

    Returns:
        Queries and keys, uint8 ``[B, bytes]``, and scales, float32 ``[B, n]``. What is not finite has scales
        that are not.
    """
    kept, rotation, largest = _of_layout(layout, block, queries.device)
    heads = queries.shape[1]
    size = heads
    if queries.device.type == "cpu":
        # as many maps at a time as stay in a core's cache
        size = max(1, _CACHED_NUMBERS // queries.shape[2] ** 2)
    parts = [
        _factors(
            queries[:, some],
            keys[:, some],
            basis[some, :, : kept.shape[-1]],
            (kept[some], rotation[some], largest[some]),
            logit_scale,
        )
        for some in (slice(start, start + size) for start in range(0, heads, size))
    ]
    q, k, scale = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    order = torch.cat(places(layout, block, kept.shape[-1], queries.device))
    scales = scale.flatten(1).index_select(1, order)
    return pack(layout, block, q), pack(layout, block, k), scales


def _factors(
    queries: Tensor,
    keys: Tensor,
    basis: Tensor,
    layout: tuple[Tensor, Tensor, Tensor],
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the integers of some heads, each ``[B, H, T, r]``, and their scales, ``[B, H, 1, r]``."""
    kept, rotation, largest = layout
    keys = centred(keys)
    logits = queries @ keys.mT
    attention = torch.softmax(logits * logit_scale, dim=-1)
    received = attention.mean(dim=-2)
    weights = received + _LEAST_WEIGHT / keys.shape[-2]
    q, k = _subspace(queries, keys, weights, basis)
    q, k = q.float() * kept, k.float() * kept
    k = _refine_keys(logits, attention, q, k)
    q, k = q @ rotation, k @ rotation
    k, key_scale = _rounded(k, largest)
    # the keys are their integers from here on, and their scales the queries' part
    q, scale = _rounded(_refine_queries(logits, attention, received, q * key_scale, k), largest)
    return q, k, scale


def start_basis(query_moment: Tensor, key_moment: Tensor) -> Tensor:
    """Compute the directions of queries that the subspace iterations start from, best first.

    Args:
        query_moment: E[q qᵀ], float64 ``[..., Dh, Dh]``.
        key_moment: E[v k̃ k̃ᵀ] of centred keys, weighted by the attention they receive, of the same shape.

    Returns:
        float64 ``[..., Dh, Dh]``, a direction a column.
    """
    root = _cholesky(query_moment)
    _, vectors = torch.linalg.eigh(root.mT @ key_moment @ root)
    basis: Tensor = torch.linalg.solve_triangular(root.mT, vectors.flip(-1), upper=True)
    return basis


def spectrum(queries: Tensor, keys: Tensor, received: Tensor) -> Tensor:
    """Compute the squared singular values of the weighted logits S·diag(√v), largest first.

    Args:
        queries: ``[..., T, Dh]``.
        keys: ``[..., T, Dh]``, centred.
        received: v, the attention that each key receives on average, ``[..., T]``.

    Returns:
        float64 ``[..., Dh]``.
    """
    first, second = _moments(queries, keys, received)
    root = _cholesky(first)
    values: Tensor = torch.linalg.eigvalsh(root.mT @ second @ root)
    return values.flip(-1).clamp_min(0)


def weighted_moments(queries: Tensor, keys: Tensor, logit_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `start_basis` and the choice of a layout need of some images.

    Args:
        queries: ``[B, H, T, Dh]``.
        keys: ``[B, H, T, Dh]``.
        logit_scale: of the teacher.

    Returns:
        Second moments of queries and of centred keys, weighted by the attention they receive, and the
        spectrum, see `spectrum`; of each image, float64 ``[B, H, Dh, Dh]`` twice and ``[B, H, Dh]``.
    """
    keys = centred(keys)
    received = queries.new_empty(queries.shape[:-1])
    for chosen in product(range(len(queries)), head_slabs(*queries.shape[1:3])):
        maps = torch.softmax(queries[chosen] @ keys[chosen].mT * logit_scale, dim=-1)
        received[chosen] = maps.mean(dim=-2)
    return *_moments(queries, keys, received), spectrum(queries, keys, received)


def _moments(queries: Tensor, keys: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
    q, k = queries.double(), keys.double()
    return q.mT @ q, k.mT @ (k * received.double().unsqueeze(-1))


def _cholesky(moment: Tensor) -> Tensor:
    """Return the Cholesky factor of a second moment, which may have fewer directions than rows."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    mean = torch.where(mean == 0, 1.0, mean)  # of nothing at all: any basis will do
    unit = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    factor: Tensor = torch.linalg.cholesky_ex(moment + _JITTER * mean * unit)[0]
    return factor


def _subspace(queries: Tensor, keys: Tensor, received: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the logits, balanced, each float64 ``[B, H, T, r]``."""
    first, second = _moments(queries, keys, received)
    directions = _orthonormal(basis.expand(*first.shape[:-2], *basis.shape[-2:]), first)
    for _ in range(ITERATIONS):
        directions = _orthonormal(second @ (first @ directions), first)
    q = queries.double() @ directions
    k = keys.double() @ (first @ directions)
    # of the weighted keys: the singular values, as far as the iterations came
    strength = (k.square() * received.double().unsqueeze(-1)).sum(-2, keepdim=True).sqrt()
    root = strength.sqrt()
    return q * root, k / root.clamp_min(1e-150)


def _orthonormal(directions: Tensor, moment: Tensor) -> Tensor:
    """Make q·z of the directions orthonormal over the tokens, each with those before it kept.

    One without a part of its own becomes about zero, not noise.
    """
    lengths = (directions * (moment @ directions)).sum(-2, keepdim=True).clamp_min(1e-300).sqrt()
    directions = directions / lengths
    unit = torch.eye(directions.shape[-1], dtype=moment.dtype, device=moment.device)
    factor, _ = torch.linalg.cholesky_ex(directions.mT @ moment @ directions + _JITTER * unit)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, directions, upper=True, left=False)
    return solved


def _refine_keys(logits: Tensor, attention: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Move each key to where the weighted change of its column of logits is less."""
    gradient = _weighted(logits - q @ k.mT, attention).mT @ q

    def curvature(step: Tensor) -> Tensor:
        return (q @ step.mT).mul_(attention).mT @ q

    return k + _step(gradient, q.square().sum(-2), curvature)


def _refine_queries(logits: Tensor, attention: Tensor, received: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Move each query to where the weighted change of its row of logits is less."""
    gradient = _weighted(logits - q @ k.mT, attention) @ k

    def curvature(step: Tensor) -> Tensor:
        return _weighted(step @ k.mT, attention) @ k

    metric = (received.unsqueeze(-1) * k.square()).sum(-2)
    return q + _step(gradient, metric, curvature)


def _weighted(change: Tensor, attention: Tensor) -> Tensor:
    """Weigh a change of logits, in place, less the constant of each row, which changes no softmax."""
    weighted = change.mul_(attention)
    return weighted.addcmul_(attention, weighted.sum(-1, keepdim=True), value=-1)


def _step(gradient: Tensor, metric: Tensor, curvature: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the step to the least value along the preconditioned gradient, of every row by itself.

    Args:
        gradient: downhill, ``[B, H, T, r]``.
        metric: what the curvature of a component is about, up to a factor, ``[B, H, r]``.
        curvature: of a step, the product with the matrix of second derivatives.
    """
    floor = (_FLOOR * metric.amax(-1, keepdim=True)).clamp_min(torch.finfo(metric.dtype).tiny)
    step = gradient / torch.maximum(metric, floor).unsqueeze(-2)
    bend = (step * curvature(step)).sum(-1, keepdim=True)
    length = (step * gradient).sum(-1, keepdim=True) / torch.where(bend > 0, bend, torch.inf)
    return length * step


def _rounded(values: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Round each component to its integers, half to even.

    Args:
        values: ``[B, H, T, r]``.
        largest: of the integers of each component, ``[H, 1, r]``, 0 of a component that is not there.

    Returns:
        The integers, of the same shape and dtype, and the scales, ``[B, H, 1, r]``.
    """
    reach = values.abs().amax(-2, keepdim=True)
    scale = reach * torch.where(largest == INT4_LARGEST, _INT4_RANGE, 1.0) / largest.clamp_min(1)
    steps = values / torch.where(scale > 0, scale, 1)
    # what is not finite is told by its scale
    return torch.minimum(torch.maximum(steps.round(), -largest), largest).nan_to_num(0.0), scale


@lru_cache(maxsize=64)
def _of_layout(layout: FactorLayout, block: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is kept of each head of a block, the rotation of its groups, and their largest integers.

    They are 1 or 0, ``[H, 1, r]``; float32 ``[H, r, r]``; and 127, 7 or 0, ``[H, 1, r]``.
    """
    heads, rank = layout.heads, layout.rank(block)
    kept, largest = torch.zeros(heads, 1, rank), torch.zeros(heads, 1, rank)
    rotation = torch.zeros(heads, rank, rank)
    for head, (whole, half) in enumerate(layout.components[block]):
        for start, count, most in ((0, whole, INT8_LARGEST), (whole, half, INT4_LARGEST)):
            group = slice(start, start + count)
            kept[head, 0, group], largest[head, 0, group] = 1, most
            if count:
                rotation[head, group, group] = hartley(count).float()
    return kept.to(device), rotation.to(device), largest.to(device)
