"""How a teacher's tokens are laid out in space (the four measures of iREPA, arXiv 2512.10794).

All take the cosine between tokens and the Manhattan distance on their grid, image by image. In the paper they
go with the FID that a teacher leads to, where the accuracy of a linear probe does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...data.errors import RepaError

if TYPE_CHECKING:
    from torch import Tensor

FAR = 6
"""From this distance on, tokens count as distant; the paper says half the side of its grid, its program 6."""
SLOPE_DISTANCES = 8
"""Distances 1 to this one give the slope."""


def measurable(grid: tuple[int, int]) -> bool:
    """Return whether a grid is large enough for all four measures."""
    return sum(grid) - 2 >= SLOPE_DISTANCES


def local_distant_similarity(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean cosine of neighbours minus that of distant tokens (LDS).

    Args:
        tokens: ``[B, T, D]``, row-major.
        grid: rows and columns, T in all.

    Returns:
        float64 ``[B]``.

    Raises:
        RepaError: the grid is not the tokens', or too small for distant tokens.
    """
    cosines, distance = _pairs(tokens, grid)
    near, far = distance == 1, distance >= FAR
    _need(far, grid)
    return cosines[:, near].mean(dim=1) - cosines[:, far].mean(dim=1)


def correlation_decay(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return by how much the mean cosine falls with each step of distance (CDS).

    The slope of a least-squares line through the means at distances 1 to 8, its sign turned.

    Args:
        tokens: ``[B, T, D]``, row-major.
        grid: rows and columns, T in all.

    Returns:
        float64 ``[B]``.

    Raises:
        RepaError: the grid is not the tokens', or too small for these distances.
    """
    cosines, distance = _pairs(tokens, grid)
    _need(distance == SLOPE_DISTANCES, grid)
    steps = torch.arange(1, SLOPE_DISTANCES + 1, dtype=torch.float64, device=tokens.device)
    means = torch.stack([cosines[:, distance == step].mean(dim=1) for step in steps.tolist()], dim=1)
    centred = steps - steps.mean()
    return -(means @ centred) / centred.square().sum()


def region_self_similarity(tokens: Tensor, grid: tuple[int, int], mask: Tensor) -> Tensor:
    """Return how much more alike neighbours in an object are than the object and what is far outside (SRSS).

    For each token of the object with such pairs, the mean cosine with its neighbours in the object minus that
    with distant tokens outside, then the mean of these.

    Args:
        tokens: ``[B, T, D]``, row-major.
        grid: rows and columns, T in all.
        mask: of the object, bool ``[B, T]``.

    Returns:
        float64 ``[B]``; not a number for an image without such a token.

    Raises:
        RepaError: the grid or the mask is not the tokens', or the grid is too small for distant tokens.
    """
    cosines, distance = _pairs(tokens, grid)
    if mask.shape != tokens.shape[:2]:
        raise RepaError(
            f"a mask {list(mask.shape)} does not fit tokens {list(tokens.shape)}",
            "give one bool a token",
            field="mask",
        )
    _need(distance >= FAR, grid)
    inside = mask.bool()
    near = (distance == 1) & inside[:, :, None] & inside[:, None, :]
    far = (distance >= FAR) & inside[:, :, None] & ~inside[:, None, :]
    contrast = _mean_where(cosines, near) - _mean_where(cosines, far)
    return contrast.nanmean(dim=1)


def spatial_contrast(tokens: Tensor) -> Tensor:
    """Return the root mean squared distance of an image's unit tokens from their mean (RMSC).

    Args:
        tokens: ``[B, T, D]``.

    Returns:
        float64 ``[B]``, from 0 to 1.
    """
    unit = F.normalize(tokens.double(), dim=-1)
    return (unit - unit.mean(dim=1, keepdim=True)).square().sum(dim=-1).mean(dim=1).sqrt()


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean over the last axis where it is asked for, or not a number."""
    return torch.where(where, values, 0.0).sum(dim=-1) / where.sum(dim=-1)


def _pairs(tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the cosines of all pairs float64 ``[B, T, T]`` and their distances ``[T, T]``."""
    rows, columns = grid
    if tokens.ndim != 3 or tokens.shape[1] != rows * columns:
        raise RepaError(
            f"tokens {list(tokens.shape)} do not lie on a grid of {rows}×{columns}",
            "give [B, T, D] and rows and columns of the T tokens",
            field="grid",
        )
    unit = F.normalize(tokens.double(), dim=-1)
    number = torch.arange(rows * columns, device=tokens.device)
    across, down = number % columns, number // columns
    distance = (down[:, None] - down).abs() + (across[:, None] - across).abs()
    return unit @ unit.mT, distance


def _need(pairs: Tensor, grid: tuple[int, int]) -> None:
    if not bool(pairs.any()):
        raise RepaError(
            f"a grid of {grid[0]}×{grid[1]} has no tokens as far apart as this measure asks for",
            f"take a teacher on a larger grid: rows and columns must add up to {SLOPE_DISTANCES + 2}",
            field="grid",
        )
