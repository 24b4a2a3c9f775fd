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
    decoded = [_numbers(layout, block, rows[:, layout.bytes_of(block)]) for rows in (queries, keys)]
    rank = layout.rank(block)
    own = scales[:, layout.scales_of(block)].float()
    factors = own.new_zeros(len(own), layout.heads * rank)
    factors[:, torch.cat(places(layout, block, rank, own.device))] = own
    decoded[0].mul_(factors.view(len(own), layout.heads, rank, 1))
    return decoded[0].mT, decoded[1].mT


def _numbers(layout: FactorLayout, block: int, rows: Tensor) -> Tensor:
    """Return the integers of a block as float32, ``[B, H, r, T]``, with zeros where a head has no component.

    They are written once, where they stay: at this size a copy costs more than the arithmetic.
    """
    count, halves = layout.counts(block)
    images, tokens, half = len(rows), layout.tokens, half_bytes(layout.tokens)
    eight = rows[:, : count * tokens].view(torch.int8).reshape(images, count, tokens)
    four = rows[:, count * tokens :].reshape(images, halves, half)
    low, high = (nibbles.to(torch.int8).sub_(_INT4_ZERO) for nibbles in (four & 15, four >> 4))
    numbers = torch.empty(
        images, layout.heads, layout.rank(block), tokens, dtype=torch.float32, device=rows.device
    )
    first, second = 0, 0
    for head, (whole, rounded) in enumerate(layout.components[block]):
        kept = whole + rounded
        numbers[:, head, :whole] = eight[:, first : first + whole]
        numbers[:, head, whole:kept, :half] = low[:, second : second + rounded]
        numbers[:, head, whole:kept, half:] = high[:, second : second + rounded, : tokens - half]
        numbers[:, head, kept:] = 0
        first, second = first + whole, second + rounded
    return numbers


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
