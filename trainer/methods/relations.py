"""How tokens relate to each other, as their cosines, and how far a student's relations are from a teacher's.

U-REPA (arXiv 2503.18414, equation 3) adds such a term to REPA's. Everything is computed in float32, or in the
widest of the dtypes given, whatever autocast says. The teacher's relations are products of its stored tokens.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..compiling import fused
from .alignment import NORM_FLOOR
from .slabs import map_slabs

Pairs: TypeAlias = Literal["image", "batch"]
"""Which tokens are paired, those of one image or those of all images that a device sees at once."""


@fused
def directions(tokens: Tensor) -> Tensor:
    """Return the tokens at length 1, in float32 or better.

    A token of zero norm has no direction: it stays zero and sends no gradient.

    Args:
        tokens: ``[…, T, D]``.

    Returns:
        ``[…, T, D]``.
    """
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    directed = tokens.detach().abs().amax(-1, keepdim=True) > NORM_FLOOR
    # the norm of a zero token has no finite gradient, so it is not taken
    norms: Tensor = torch.linalg.vector_norm(torch.where(directed, tokens, 1), dim=-1, keepdim=True)
    return torch.where(directed, tokens, 0) / norms


def gram(tokens: Tensor) -> Tensor:
    """Return the cosine of every two tokens of an image.

    Args:
        tokens: ``[B, T, D]``.

    Returns:
        ``[B, T, T]``, in float32 or better.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        unit = directions(tokens)
        return unit @ unit.mT


def manifold_distance(tokens: Tensor, targets: Tensor, *, pairs: Pairs = "image") -> Tensor:
    """Return the mean squared difference between the cosines of pairs of tokens and of pairs of targets.

    U-REPA's L_ML (arXiv 2503.18414, equation 3, whose sign is misprinted): the mean over images and all T²
    ordered pairs of tokens of *one* image. A token is also paired with itself; there the difference is 0,
    and leaving it out would scale the mean by T / (T − 1). The paper does not say whether pairs
    of different images enter: with ``pairs="batch"`` they do, the mean is over all (B · T)² pairs, and its
    value depends on how many images a device sees at once.

    It is 0 where the tokens are a rotation of the targets. Both factors of the student's cosines get a
    gradient, the targets get what they ask for.

    Args:
        tokens: ``[B, T, D]``.
        targets: ``[B, T, D']``.
        pairs: which tokens are paired, ``image`` or ``batch``.

    Returns:
        A scalar in float32 or better, between 0 and 4.

    Raises:
        ValueError: there is no such reading of the pairs.
    """
    if pairs not in get_args(Pairs):
        raise ValueError(f"pairs {pairs!r} is none of {', '.join(get_args(Pairs))}")
    with torch.autocast(tokens.device.type, enabled=False):
        student, teacher = (directions(each) for each in (tokens, targets))
        if pairs == "image":
            dtype = torch.promote_types(student.dtype, teacher.dtype)
            distance: Tensor = _GramDistance.apply(student.to(dtype), teacher.to(dtype))
            return distance
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        count = len(student)
        # ‖AAᵀ − BBᵀ‖² = ‖AᵀA‖² − 2‖AᵀB‖² + ‖BᵀB‖² in Frobenius norms: D² numbers in place of (B · T)²
        products = (student.mT @ student, student.mT @ teacher, teacher.mT @ teacher)
        own, across, theirs = ((each / count).square().sum() for each in products)
        return own - 2 * across + theirs


class _GramDistance(torch.autograd.Function):
    """With G = U·Uᵀ − V·Vᵀ of an image the gradient of mean G² is 4·G·U / (B · T²) in U, and −4·G·V in V.

    So it is known as soon as G is, and no more of the maps ``[B, T, T]`` exist than a slab; kept for backward
    are gradients ``[B, T, D]`` alone.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        images, count = student.shape[:2]
        sides, signs = (student, teacher), (1, -1)
        gradients = [
            torch.empty_like(side) if wanted else None
            for side, wanted in zip(sides, ctx.needs_input_grad, strict=True)
        ]
        of_image = student.new_empty(images)
        for some, _ in map_slabs(images, 1, count, device=student.device):
            off = student[some] @ student[some].mT
            off -= teacher[some] @ teacher[some].mT
            for side, sign, gradient in zip(sides, signs, gradients, strict=True):
                if gradient is not None:
                    gradient[some] = (off @ side[some]).mul_(sign * 4 / (images * count**2))
            of_image[some] = off.square_().mean((1, 2))
        ctx.save_for_backward(*gradients)
        return of_image.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if each is None else upstream * each for each in ctx.saved_tensors)


@fused
def mean_pair_cosine(tokens: Tensor) -> Tensor:
    """Return the mean cosine of two different tokens of an image, near 1 where all tokens became one.

    Args:
        tokens: ``[B, T, D]``.

    Returns:
        A scalar in float32 or better; 0 where an image is a single token.
    """
    unit = directions(tokens)
    count = tokens.shape[1]
    # Σ_{i ≠ j} u_i · u_j = ‖Σ u_i‖² − Σ ‖u_i‖²
    sums = unit.sum(1).square().sum(-1) - unit.square().sum((-1, -2))
    return (sums / max(count * (count - 1), 1)).mean()
