"""Balanced truncation of queries and keys to the r numbers per head that keep their products best.

For one block and head the logits are a bilinear form q·k̃, with k̃ the keys less their mean over the tokens
(which changes no probability: it adds one constant to each row of logits). With second moments
Σ_q = E[q qᵀ], Σ_k = E[k̃ k̃ᵀ] over a calibration set and the singular value decomposition
Σ_q^½ Σ_k^½ = U S Vᵀ,

    q′ = (Σ_q^−½ U_r S_r^½)ᵀ q,   k′ = (Σ_k^−½ V_r S_r^½)ᵀ k̃

have the products q′·k′ that are nearest to q·k̃ in mean square among all forms of rank r (Eckart and Young on
the whitened form; q and k̃ drawn independently). The name is that of model reduction: both sides are brought
to the same second moments, S. Truncating attention targets so is ours; HASTE itself: arXiv 2505.16792.

The r numbers are then turned by one orthogonal matrix, the same for q′ and k′, which changes no product. It
is for int8: rounding errors of component i of q′ meet component i of k′, so with a scale for each component
the error of a logit has a variance in proportion to Σ sᵢ², which the first few components make up. Turned so
that all are alike it is (Σ sᵢ)²/r, smaller by up to a factor of r. (Rotations before rounding: QuaRot, arXiv
2404.00456; the matrix here, and its use on both factors of a bilinear form, are ours.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# eigenvalues of a second moment below this share of the largest are rounding: no direction to divide by
_FLOOR = 1e-12


def centred(keys: Tensor) -> Tensor:
    """Subtract from keys ``[..., T, Dh]`` their mean over the tokens, which does not change attention."""
    return keys - keys.mean(dim=-2, keepdim=True)


def second_moment(values: Tensor) -> Tensor:
    """Compute the mean of v vᵀ over the tokens.

    Args:
        values: ``[..., T, Dh]``.

    Returns:
        float64 ``[..., Dh, Dh]``.
    """
    exact = values.double()
    return exact.transpose(-1, -2) @ exact / values.shape[-2]


def balanced_projections(query_moment: Tensor, key_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the projections of all ranks at once, not turned yet. The first r rows are those of rank r.

    Directions without queries, or without keys, have no part in any logit of the calibration set; they get
    rows of zeros.

    Args:
        query_moment: Σ_q, float64 ``[L, H, Dh, Dh]``.
        key_moment: Σ_k of centred keys, the same shape.

    Returns:
        Projections of queries and of centred keys, each float64 ``[L, H, Dh, Dh]``. Signs are fixed: the
        largest number in each row of the first is positive.
    """
    query_root, query_inverse = _roots(query_moment)
    key_root, key_inverse = _roots(key_moment)
    left, singular, right = torch.linalg.svd(query_root @ key_root)
    weight = singular.sqrt().unsqueeze(-1)
    query_rows = weight * (left.transpose(-1, -2) @ query_inverse)
    key_rows = weight * (right @ key_inverse)
    largest = query_rows.abs().argmax(dim=-1, keepdim=True)
    sign = torch.where(query_rows.gather(-1, largest) < 0, -1.0, 1.0)
    return sign * query_rows, sign * key_rows


def truncated(balanced: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Cut projections to a rank, turned so that the components are alike.

    Args:
        balanced: from `balanced_projections`.
        rank: r.

    Returns:
        Projections of queries and of centred keys, each float32 ``[L, H, r, Dh]``.
    """
    turn = hartley(rank).to(balanced[0].device)
    query_rows, key_rows = (turn @ each[..., :rank, :] for each in balanced)
    return query_rows.float(), key_rows.float()


def hartley(size: int) -> Tensor:
    """Return the matrix of the discrete Hartley transform, (cos + sin)(2πij/n)/√n.

    It is orthogonal and symmetric, there is one of every size, and all of its numbers are of like magnitude.

    Returns:
        float64 ``[n, n]``.
    """
    number = torch.arange(size, dtype=torch.float64)
    # whole turns are taken off before the angle is formed, where they are exact
    angle = (number[:, None] * number % size) * (2 * math.pi / size)
    return (angle.cos() + angle.sin()) / math.sqrt(size)


def project(values: Tensor, projection: Tensor) -> Tensor:
    """Cut queries, or centred keys.

    Args:
        values: float32 ``[B, L, H, T, Dh]``.
        projection: float32 ``[L, H, r, Dh]``.

    Returns:
        float32 ``[B, L, H, T, r]``.
    """
    return values @ projection.transpose(-1, -2)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric positive semidefinite matrix, and the pseudo-inverse of the root."""
    values, vectors = torch.linalg.eigh(moment)
    values = torch.where(values > _FLOOR * values[..., -1:].clamp(min=0), values, 0.0)
    root = values.sqrt()
    inverse = torch.where(root > 0, 1 / root.where(root > 0, 1.0), 0.0)
    back = vectors.transpose(-1, -2)
    return (vectors * root.unsqueeze(-2)) @ back, (vectors * inverse.unsqueeze(-2)) @ back
