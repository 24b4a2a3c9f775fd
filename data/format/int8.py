"""The storage form int8, where a number is an integer from -127 to 127 times the scale of its channel.

A column of int8 values ``[..., T, C]`` has a column of float32 scales ``[..., C]`` beside it: the axis before
the last, the tokens, is the one they share. For patch tokens ``[T, D]`` that is a scale per image, view and
channel; for queries and keys ``[L, H, T, r]`` one per image, view, block, head and component. A scale is the
largest magnitude of its channel over 127, so that nothing is clipped; a channel of zeros has scale 0.

The same two functions write a cache and read it, on whatever device the values lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round to int8, half to even.

    A value moves by at most half its scale: by 1/254 of the largest magnitude of its channel.

    Args:
        values: floating point ``[..., T, C]``.

    Returns:
        int8 ``[..., T, C]`` and float32 scales ``[..., C]``. A channel that is not finite has a scale that is
        not, so that who writes can refuse it.
    """
    values = values.float()
    scale = values.abs().amax(dim=-2) / LARGEST
    steps = values / torch.where(scale > 0, scale, 1).unsqueeze(-2)
    # a subnormal scale is rounded coarsely: it must not carry a value past int8
    return steps.round().clamp(-LARGEST, LARGEST).nan_to_num(0.0).to(torch.int8), scale


def dequantise(stored: Tensor, scale: Tensor) -> Tensor:
    """Compute the numbers that int8 stands for.

    Args:
        stored: int8 ``[..., T, C]``.
        scale: float32 ``[..., C]``.

    Returns:
        float32 ``[..., T, C]``.
    """
    return stored.float() * scale.float().unsqueeze(-2)
