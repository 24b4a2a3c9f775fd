"""How many attention maps are formed at a time while a form of attention is fitted, measured or computed.

All maps of a block and an image, ``[H, T, T]``, have 0.8 million numbers at 256 tokens and 12.6 million at
1,024, twelve heads each; a core's lane holds several such tensors in float64, and there are as many lanes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAP_NUMBERS = 1 << 20
"""Probabilities that one lane forms at a time, in float64 8 MiB: 16 maps of 256 tokens, one of 1,024."""

GPU_MAP_NUMBERS = 1 << 26
"""The same of factors on a GPU, in float32 256 MiB: 85 images of 12 heads at 256 tokens, 5 at 1,024."""


def head_slabs(heads: int, tokens: int) -> Iterator[slice]:
    """Yield heads whose maps together have at most `MAP_NUMBERS`, or are a single one.

    Args:
        heads: H.
        tokens: T.
    """
    size = max(1, MAP_NUMBERS // tokens**2)
    for start in range(0, heads, size):
        yield slice(start, start + size)


def images_at_once(heads: int, tokens: int) -> int:
    """Count the images whose maps of a block together have at most `GPU_MAP_NUMBERS`, at least one.

    Args:
        heads: H.
        tokens: T.
    """
    return max(1, GPU_MAP_NUMBERS // (heads * tokens**2))
