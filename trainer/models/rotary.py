"""Rotary positions on a grid, which turn queries and keys by angles of their row and column (RoPE).

The axial form of VisionLLaMA (arXiv 2403.00522), which U-DiT and U-REPA take over, and that of EVA-02
(arXiv 2303.11331), which LightningDiT, GMem and ERW take over. They differ in the order of the pairs alone.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

THETA = 10_000.0

Pairs: TypeAlias = Literal["alternating", "halves"]
"""Whether a head's pairs of channels turn by column and row in turn, or the first half by row."""


def axial_rotation(
    head_width: int,
    grid: tuple[int, int],
    theta: float = THETA,
    *,
    pairs: Pairs = "alternating",
    ahead: int = 0,
) -> Tensor:
    """Compute the rotation of each token, as cosines and sines of the angles of its pairs of channels.

    There are d / 4 frequencies, θ^(−4m / d) for m < d / 4, d the channels of a head. Of alternating pairs,
    pair 2m turns by column · θ^(−4m / d) and pair 2m + 1 by row · θ^(−4m / d); of halves, pair m by row and
    pair d / 4 + m by column. Rows and columns are counted from 0 on each grid.

    Args:
        head_width: d, a multiple of 4.
        grid: rows and columns.
        theta: θ.
        pairs: their order.
        ahead: tokens before those of the grid, which are not turned.

    Returns:
        float64 ``[2, ahead + rows · columns, d / 2]``, the cosines first.

    Raises:
        ValueError: d is no multiple of 4.
    """
    if head_width % 4:
        raise ValueError(
            f"heads of {head_width} channels cannot be turned by row and by column: no multiple of 4"
        )
    rows, columns = (torch.arange(count, dtype=torch.float64) for count in grid)
    by_row, by_column = rows.repeat_interleave(grid[1]), columns.repeat(grid[0])
    frequencies = theta ** (-torch.arange(0, head_width, 4, dtype=torch.float64) / head_width)
    if pairs == "halves":
        angles = (torch.stack([by_row, by_column], dim=1)[:, :, None] * frequencies).flatten(1)
    else:
        angles = (frequencies[:, None] * torch.stack([by_column, by_row], dim=1)[:, None, :]).flatten(1)
    angles = F.pad(angles, (0, 0, ahead, 0))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of a head, as one complex number, by the angle of its token.

    Args:
        heads: queries or keys ``[B, H, T, d]``.
        rotation: ``[2, T, d / 2]``, of `axial_rotation`.

    Returns:
        ``[B, H, T, d]``.
    """
    cosines, sines = rotation.unbind(0)
    real, imaginary = heads.reshape(*heads.shape[:-1], -1, 2).unbind(-1)
    turned = (real * cosines - imaginary * sines, real * sines + imaginary * cosines)
    return torch.stack(turned, dim=-1).flatten(-2)
