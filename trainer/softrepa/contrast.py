"""The contrastive loss, of how well each caption of a batch explains each image (arXiv 2503.08250)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHARPNESS = 4.0
TEMPERATURE = 0.07
"""The released constants, which are never trained."""


class RowsOfPairs(NamedTuple):
    """Some images of a batch against all its captions.

    Attributes:
        first: number of the first of these images.
        errors: e_ij, ``[r, B]`` float32 or better, with gradient.
        loss: their share of the loss of the batch.
    """

    first: int
    errors: Tensor
    loss: Tensor


def pair_logits(errors: Tensor) -> Tensor:
    """Return 4·exp(−e/0.07), in (0, 4], of errors of any shape."""
    return SHARPNESS * torch.exp(-errors / TEMPERATURE)


def contrastive_loss(errors: Tensor, same: Tensor, *, first: int = 0, matched_weight: float = 0.0) -> Tensor:
    """Return the share that some rows have in the loss of their batch, which is the sum of all shares.

    It is mean_i CE(l_i, i) + d·mean_i e_ii with l = `pair_logits`; images choose among captions, not the
    other way round. Rows do not depend on one another.

    Args:
        errors: e_ij, rows images, columns captions, ``[r, B]``.
        same: which captions are equal, bool ``[B, B]``; another image's equal caption is no negative.
        first: number of the first row.
        matched_weight: d.
    """
    rows, count = errors.shape
    own = torch.arange(first, first + rows, device=errors.device)
    logits = pair_logits(errors).masked_fill(_others(same, own), -torch.inf)
    share = F.cross_entropy(logits, own, reduction="sum") / count
    if matched_weight:
        share = share + matched_weight * errors.gather(1, own[:, None]).sum() / count
    return share


def rows_of_pairs(
    predict: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    same: Tensor,
    *,
    rows: int,
    matched_weight: float = 0.0,
) -> Iterator[RowsOfPairs]:
    """Yield the pairs of a batch, some images at a time, whose memory is free once they are let go of.

    Args:
        predict: images int64 ``[P]`` and captions int64 ``[P]`` by number → predictions ``[P, C, h, w]``.
        target: what they are compared with, ``[B, C, h, w]``.
        same: as of `contrastive_loss`.
        rows: images at a time.
        matched_weight: d.
    """
    count = len(target)
    captions = torch.arange(count, device=target.device)
    for first in range(0, count, rows):
        images = torch.arange(first, min(first + rows, count), device=target.device)
        predicted = predict(images.repeat_interleave(count), captions.repeat(len(images)))
        predicted = predicted.to(target.dtype).reshape(len(images), count, *target.shape[1:])
        errors = (target[images, None] - predicted).square().flatten(2).mean(dim=2)
        loss = contrastive_loss(errors, same, first=first, matched_weight=matched_weight)
        yield RowsOfPairs(first, errors, loss)


def found(errors: Tensor, same: Tensor, *, first: int = 0) -> Tensor:
    """Return whether each image's own caption has its least error, bool ``[r]``.

    Arguments are those of `contrastive_loss`.
    """
    own = torch.arange(first, first + len(errors), device=errors.device)
    compared = errors.detach().masked_fill(_others(same, own), torch.inf)
    return compared.argmin(dim=1) == own


def _others(same: Tensor, own: Tensor) -> Tensor:
    """Return which captions of rows are equal to the row's own and another image's, bool ``[r, B]``."""
    equal = same[own].clone()
    equal[torch.arange(len(own), device=own.device), own] = False
    return equal
