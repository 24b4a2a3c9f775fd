"""Maps of a token against a token, ``[T, T]`` of each image and head, formed some at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

MAP_NUMBERS = 1 << 24
"""Numbers of one side's maps that exist at a time on a GPU.

In float32 that is 64 MiB: 16 maps at T = 1,024, where those of one block of 32 images and 12 heads would be
1.5 GiB. Slabs are of whole maps, so what else lies in one changes no row's softmax, no sum and no product.
"""
MAP_NUMBERS_ON_CPU = 1 << 22
"""The same on a CPU, where larger slabs took longer: every pass over them went to memory."""


def map_slabs(images: int, heads: int, tokens: int, *, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Yield images and heads whose maps together are no larger than a slab, or are a single one."""
    numbers = MAP_NUMBERS_ON_CPU if device.type == "cpu" else MAP_NUMBERS
    heads_at_once = min(heads, max(1, numbers // tokens**2))
    images_at_once = max(1, numbers // (heads_at_once * tokens**2))
    for image in range(0, images, images_at_once):
        for head in range(0, heads, heads_at_once):
            yield slice(image, image + images_at_once), slice(head, head + heads_at_once)
