"""HASTE's attention term (arXiv 2505.16792), a cross entropy from a teacher's attention to the student's.

Both sides are given as queries and keys; of a block's maps ``[B, H, T, T]`` a slab exists at a time, see
`map_slabs`, and within the forward pass alone, which works out the gradient of queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compiling import fused
from .slabs import map_slabs


def attention_alignment(
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    *,
    scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the cross entropy H(P_T, P_S), and what of it is not the teacher's own entropy.

    P = softmax over the keys of (q · kᵀ) · scale, the mean is over images, heads and query rows. The cross
    entropy is least where P_S = P_T; it is the teacher's entropy there, not 0, and so the excess
    H(P_T, P_S) − H(P_T) = KL(P_T ‖ P_S) ≥ 0 tells how far the student is.
    Computed in float32, or in the widest of the dtypes given, whatever autocast says.

    Args:
        queries: of the student, ``[B, H, T, d]``.
        keys: of the student, ``[B, H, T, d]``.
        teacher_queries: ``[B, H, T, r]``; gets no gradient.
        teacher_keys: ``[B, H, T, r]``; gets no gradient.
        scale: of the student's logits, 1/√d.
        teacher_scale: of the teacher's logits.

    Returns:
        The cross entropy and, without gradient, the excess: scalars in nats.
    """
    inputs = (queries, keys, teacher_queries, teacher_keys)
    dtype = torch.float32
    for each in inputs:
        dtype = torch.promote_types(dtype, each.dtype)
    with torch.autocast(queries.device.type, enabled=False):
        wide = [each.to(dtype) for each in inputs]
        result: tuple[Tensor, Tensor] = _Alignment.apply(*wide, scale, teacher_scale)
    return result


class _Alignment(torch.autograd.Function):
    """With S = q · kᵀ · s the gradient of the mean cross entropy is (P_S − P_T) / (B · H · T) in S.

    So it is known as soon as the probabilities are; kept for backward are the gradients of q and k alone,
    T / d times less than one map.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        teacher_queries: Tensor,
        teacher_keys: Tensor,
        scale: float,
        teacher_scale: float,
    ) -> tuple[Tensor, Tensor]:
        per_row = queries.new_empty(2, *queries.shape[:3])
        wanted = any(ctx.needs_input_grad)
        gradients = [torch.empty_like(each) for each in (queries, keys)] if wanted else []
        for some in map_slabs(*per_row.shape[1:], device=queries.device):
            per_row[0][some], per_row[1][some], *found = _compare(
                queries[some],
                keys[some],
                teacher_queries[some],
                teacher_keys[some],
                scale=scale,
                teacher_scale=teacher_scale,
                factor=scale / per_row[0].numel() if wanted else None,
            )
            for gradient, part in zip(gradients, found, strict=True):
                gradient[some] = part
        ctx.save_for_backward(*gradients)
        cross_entropy, excess = -per_row[0].mean(), per_row[1].mean()
        ctx.mark_non_differentiable(excess)
        return cross_entropy, excess

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        for_queries, for_keys = ctx.saved_tensors
        return upstream * for_queries, upstream * for_keys, None, None, None, None


@fused
def _compare(
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    *,
    scale: float,
    teacher_scale: float,
    factor: float | None,
) -> tuple[Tensor, ...]:
    """Compute −H(P_T, P_S) and the excess of each row of a slab, ``[B, H, T]``, and the gradients.

    Args:
        queries: of the student, as are the next, see `attention_alignment`.
        keys: of the student.
        teacher_queries: of the teacher.
        teacher_keys: of the teacher.
        scale: of the student's logits.
        teacher_scale: of the teacher's.
        factor: of P_S − P_T in the gradients of queries and keys; None for no gradients.
    """
    teacher_log = _log_probabilities(teacher_queries, teacher_keys, teacher_scale)
    teacher = teacher_log.exp()
    student_log = _log_probabilities(queries, keys, scale)
    cross = (teacher * student_log).sum(-1)
    # not as a difference of two entropies, which would round to a little less than 0 near the minimum
    excess = teacher_log.sub_(student_log).mul_(teacher).sum(-1)
    if factor is None:
        return cross, excess
    gradient = student_log.exp_().sub_(teacher).mul_(factor)
    return cross, excess, gradient @ keys, gradient.mT @ queries


def _log_probabilities(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return log softmax over the keys of (q · kᵀ) · scale, ``[B, H, T, T]``."""
    return torch.log_softmax((queries @ keys.mT).mul_(scale), dim=-1)
