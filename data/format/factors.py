"""Packing and decoding of queries and keys as factors, see `factor_layout` for the format.

The same functions write a cache and read it, on whatever device the values lie.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .factor_layout import half_bytes

if TYPE_CHECKING:
    from .factor_layout import FactorLayout

_INT4_ZERO = 8


def pack(layout: FactorLayout, block: int, codes: Tensor) -> Tensor:
    """Pack the integers of a block's queries, or of its keys.

    Args:
        layout: of the cache.
        block: index on the axis L.
        codes: integers ``[B, H, T, r]`` of any dtype, of every head first its int8 components, then its int4
            ones, and then what is passed over.

    Returns:
        uint8 ``[B, bytes]``.
    """
    images, half = len(codes), half_bytes(layout.tokens)
    planes = codes.mT.reshape(images, -1, layout.tokens)
    whole, nibbles = (planes[:, chosen] for chosen in places(layout, block, codes.shape[-1], codes.device))
    low, high = nibbles[..., :half], nibbles[..., half:]
    if low.shape[-1] > high.shape[-1]:
        high = torch.nn.functional.pad(high, (0, 1))
    joined = (low + _INT4_ZERO).to(torch.uint8) | (high + _INT4_ZERO).to(torch.uint8) << 4
    return torch.cat([whole.to(torch.int8).view(torch.uint8).flatten(1), joined.flatten(1)], dim=1)


def unpack(
    layout: FactorLayout, block: int, queries: Tensor, keys: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Decode a block's queries and keys where they lie.

    Args:
        layout: of the cache.
        block: index on the axis L.
        queries: rows of q, uint8 ``[B, bytes]``.
        keys: rows of k, uint8 ``[B, bytes]``.
        scales: rows of q's scales, float32 ``[B, n]``.

    Returns:
        Queries and keys, each float32 ``[B, H, T, r]``. A head with fewer than r components has zeros beyond.
    """
    factors = scales[:, layout.scales_of(block)].float().unsqueeze(-1)
    whole, _ = layout.counts(block)
    decoded = []
    for rows, scaled in ((queries, True), (keys, False)):
        parts = _numbers(layout, block, rows[:, layout.bytes_of(block)])
        if scaled:
            parts = parts[0] * factors[:, :whole], parts[1] * factors[:, whole:]
        decoded.append(_spread(layout, block, parts))
    return decoded[0], decoded[1]


def _numbers(layout: FactorLayout, block: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers of a block as float32, of int8 ``[B, n, T]`` and of int4."""
    whole, half = layout.counts(block)
    tokens = layout.tokens
    eight = rows[:, : whole * tokens].view(torch.int8).reshape(len(rows), whole, tokens)
    four = rows[:, whole * tokens :].reshape(len(rows), half, half_bytes(tokens))
    numbers = torch.cat([four & 15, four >> 4], dim=-1)[..., :tokens]
    return eight.float(), numbers.float().sub_(_INT4_ZERO)


def _spread(layout: FactorLayout, block: int, parts: tuple[Tensor, Tensor]) -> Tensor:
    """Bring the components of all heads, ``[B, n, T]``, to ``[B, H, T, r]``."""
    rank = layout.rank(block)
    images, _, tokens = parts[0].shape
    spread = parts[0].new_zeros(images, layout.heads * rank, tokens)
    for values, chosen in zip(parts, places(layout, block, rank, spread.device), strict=True):
        spread.index_copy_(1, chosen, values)
    return spread.view(images, layout.heads, rank, tokens).mT


@lru_cache(maxsize=256)
def places(layout: FactorLayout, block: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where int8 and int4 components lie on the axis H·r, each int64 ``[n]``."""
    found: tuple[list[int], list[int]] = ([], [])
    for head, (whole, half) in enumerate(layout.components[block]):
        start = head * rank
        found[0].extend(range(start, start + whole))
        found[1].extend(range(start + whole, start + whole + half))
    first, second = (torch.tensor(each, dtype=torch.int64, device=device) for each in found)
    return first, second
