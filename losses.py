"""The alignment terms of REPA and HASTE as functions, for a training loop that is not ours.

They are those that `repa train` computes; teachers' values come from `repa.open`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .data.errors import RepaError
from .trainer.methods.alignment import cosine_similarity, projector
from .trainer.methods.attention import attention_alignment

if TYPE_CHECKING:
    from torch import Tensor

    from .attention import Attention

__all__ = ["haste", "projector", "repa"]


def repa(projected: Tensor, tokens: Tensor) -> Tensor:
    """Return REPA's term, minus the mean cosine of each projected token with the teacher's.

    Source: Yu et al., arXiv 2410.06940, where it is added with a weight of 0.5. Computed in
    float32 or better.

    Args:
        projected: tokens of the student behind a `projector`, ``[B, T, D]``.
        tokens: of the teacher, ``[B, T, D]`` in floating point; they get no gradient.

    Returns:
        A scalar from −1, where all point the same way, to 1.

    Raises:
        RepaError: the shapes differ.
    """
    if projected.shape != tokens.shape:
        raise RepaError(
            f"projected tokens {list(projected.shape)} do not fit the teacher's {list(tokens.shape)}",
            "give the projector the teacher's width, and align tokens of one grid",
            field="projected",
        )
    return -cosine_similarity(projected, tokens.detach()).mean()


def haste(queries: Tensor, keys: Tensor, teacher: Attention) -> Tensor:
    """Return HASTE's attention term for one pair of blocks, the cross entropy from teacher to student.

    H(P_T, P_S) in nats, the mean over images, heads and query rows, with P = softmax over the keys. It is
    compared with the teacher's heads in order; heads of the student beyond theirs are left alone. HASTE adds
    the mean over its pairs of blocks with a weight of 0.5 to `repa`, and drops both after some steps
    (arXiv 2505.16792). No map outlives the call, and only one block's is ever there.

    Args:
        queries: of the student's block, ``[B, H, T, d]``; the scale of its logits is 1/√d.
        keys: of the student's block, ``[B, H, T, d]``.
        teacher: what `OpenedCache.attention` returns; it gets no gradient.

    Returns:
        A scalar, least where the maps are equal: there it is the teacher's entropy.

    Raises:
        RepaError: the student has fewer heads, or other tokens.
    """
    heads = teacher.queries.shape[1]
    if (
        queries.shape[1] < heads
        or queries.shape[2] != teacher.queries.shape[2]
        or keys.shape != queries.shape
    ):
        raise RepaError(
            f"queries {list(queries.shape)} and keys {list(keys.shape)} do not fit the teacher's "
            f"{list(teacher.queries.shape)}",
            "give [B, H, T, d] with at least the teacher's heads H, and its tokens T",
            field="queries",
        )
    cross_entropy, _ = attention_alignment(
        queries[:, :heads],
        keys[:, :heads],
        teacher.queries.detach(),
        teacher.keys.detach(),
        scale=queries.shape[-1] ** -0.5,
        teacher_scale=teacher.scale,
    )
    return cross_entropy
