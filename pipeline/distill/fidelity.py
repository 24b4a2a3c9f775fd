"""How far an encoder's tokens are from the cached ones of its teacher, on held-out images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..columns.measures import TokenErrors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..encoders.base import Encoder
    from .pairs import Pairs

NEIGHBOURS = 10


@torch.inference_mode()
def fidelity(encoder: Encoder, pairs: Iterable[Pairs]) -> dict[str, Any]:
    """Measure an encoder.

    Args:
        encoder: the copy.
        pairs: held-out images and the teacher's tokens; two images or more.

    Returns:
        ``images``; cosines of patch tokens to the teacher's, ``patch_cosine_mean``, their 1st percentile
        ``patch_cosine_p01``, and the mean of the image where it is lowest, ``patch_cosine_worst_image``;
        ``shuffled_cosine``, the mean to the same token of another image, below which nothing has been
        learned; ``class_cosine_mean``; ``relative_l2``, ‖s − t‖ / ‖t‖ over an image's patch tokens, mean;
        ``gram_error``, the mean of |ŝ·ŝ′ − t̂·t̂′| over an image's pairs of tokens; ``repa_loss_change``, the
        mean of |cos(p, t) − cos(p, s)| as of stored tokens, see `TokenErrors`; and ``neighbour_agreement``,
        the share of an image's nearest by class token, of ``neighbours``, that are the teacher's too.
    """
    cosines: list[Tensor] = []
    sums: dict[str, list[Tensor]] = {name: [] for name in ("shuffled", "cls", "l2", "gram", "change")}
    classes: list[Tensor] = []
    before: Tensor | None = None
    errors: TokenErrors | None = None
    for batch in pairs:
        features = encoder.encode(batch.images)
        found, tokens = features["patch"], batch.patch
        errors = errors or TokenErrors(*tokens.shape[1:])
        cosines.append(F.cosine_similarity(found, tokens, dim=-1))
        others = tokens[:-1] if before is None else torch.cat([before, tokens[:-1]])
        sums["shuffled"].append(
            F.cosine_similarity(found[len(found) - len(others) :], others, dim=-1).mean(1)
        )
        before = tokens[-1:]
        sums["cls"].append(F.cosine_similarity(features["cls"], batch.cls, dim=-1))
        sums["l2"].append((found - tokens).flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1))
        own, theirs = (F.normalize(each, dim=-1) for each in (found, tokens))
        sums["gram"].append((own @ own.mT - theirs @ theirs.mT).abs().mean(dim=(1, 2)))
        sums["change"].append(errors(tokens, found)[1].abs().mean(dim=1))
        classes.append(torch.stack([features["cls"], batch.cls]))
    cosine = torch.cat(cosines).double()
    mean = {name: float(torch.cat(values).double().mean()) for name, values in sums.items()}
    own_classes, their_classes = torch.cat(classes, dim=1)
    count = min(NEIGHBOURS, len(cosine) - 1)
    return {
        "images": len(cosine),
        "patch_cosine_mean": float(cosine.mean()),
        "patch_cosine_p01": _quantile(cosine.flatten(), 0.01),
        "patch_cosine_worst_image": float(cosine.mean(dim=1).min()),
        "shuffled_cosine": mean["shuffled"],
        "class_cosine_mean": mean["cls"],
        "relative_l2": mean["l2"],
        "gram_error": mean["gram"],
        "repa_loss_change": mean["change"],
        "neighbour_agreement": neighbour_agreement(own_classes, their_classes, count),
        "neighbours": count,
    }


def neighbour_agreement(first: Tensor, second: Tensor, count: int) -> float:
    """Return the share of nearest neighbours that two encoders have in common, from 0 to 1.

    Args:
        first: features of N images ``[N, D]``, compared by cosine.
        second: of the same images by another encoder ``[N, E]``.
        count: neighbours of an image, fewer than N.
    """
    near = []
    for features in (first, second):
        unit = F.normalize(features.double(), dim=1)
        alike = (unit @ unit.mT).fill_diagonal_(-torch.inf)
        chosen = alike.topk(count, dim=1).indices
        near.append(torch.zeros_like(alike).scatter_(1, chosen, 1.0))
    return float((near[0] * near[1]).sum(dim=1).mean()) / count


def _quantile(values: Tensor, share: float) -> float:
    """Return the largest value that at most this share of the values is below."""
    # torch.quantile takes 16 million values at most
    return float(values.kthvalue(max(1, round(share * len(values)))).values)
