"""Rotary positions on a grid, which turn queries and keys by angles of their row and column.

The axial form of VisionLLaMA (arXiv 2403.00522), which U-DiT and U-REPA take over.
"""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10_000.0


def axial_rotation(head_width: int, grid: tuple[int, int], theta: float = THETA) -> Tensor:
    """Compute the rotation of each token, as cosines and sines of the angles of its pairs of channels.

    Pair 2m turns by column · θ^(−4m / d), pair 2m + 1 by row · θ^(−4m / d), d the channels of a head.
    Rows and columns are counted from 0 on each grid.

    Args:
        head_width: d, a multiple of 4.
        grid: rows and columns.
        theta: θ.

    Returns:
        float64 ``[2, rows · columns, d / 2]``, the cosines first.

    Raises:
        ValueError: d is no multiple of 4.
    """
    if head_width % 4:
        raise ValueError(
            f"heads of {head_width} channels cannot be turned by row and by column: no multiple of 4"
        )
    rows, columns = (torch.arange(count, dtype=torch.float64) for count in grid)
    places = torch.stack([columns.repeat(grid[0]), rows.repeat_interleave(grid[1])], dim=1)
    frequencies = theta ** (-torch.arange(0, head_width, 4, dtype=torch.float64) / head_width)
    angles = (frequencies[:, None] * places[:, None, :]).flatten(1)
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
