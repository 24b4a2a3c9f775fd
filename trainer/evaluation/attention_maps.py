"""Attention maps from queries and keys, and how spread out they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def attention_maps(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return softmax over the keys of (q · kᵀ) · scale.

    Args:
        queries: ``[B, H, T, r]``.
        keys: ``[B, H, T, r]``.
        scale: of the logits.

    Returns:
        float32 ``[B, H, T, T]``.
    """
    return torch.softmax(queries.float() @ keys.float().mT * scale, dim=-1)


def attention_entropy(maps: Tensor) -> Tensor:
    """Return the mean entropy of a head's rows.

    Args:
        maps: ``[B, H, T, T]``.

    Returns:
        Nats ``[B, H]``, from 0, where each token looks at one other, to log T, where it looks at all alike.
    """
    entropy: Tensor = torch.special.entr(maps).sum(dim=-1).mean(dim=-1)
    return entropy
