"""How far what is stored lies from what the teacher computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PREDICTION_COSINE = 0.5
PREDICTION_SEED = 0


def attention_divergence(
    exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], logit_scale: float
) -> Tensor:
    """Compute KL(teacher ‖ stored) of each query's attention over the patch keys, in nats and in float64.

    Args:
        exact: queries and keys as computed, each float32 ``[B, L, H, T, Dh]``.
        stored: queries and keys as read back, each float32 ``[B, L, H, T, r]``.
        logit_scale: of both.

    Returns:
        float64 ``[B, L, H, T]``.
    """
    images, blocks, heads, tokens, _ = exact[0].shape
    result = torch.empty((images, blocks, heads, tokens), dtype=torch.float64, device=exact[0].device)
    for image in range(images):
        for block in range(blocks):  # all maps at once would be as large as what the cache avoids to hold
            teacher, kept = (
                torch.log_softmax(
                    q[image, block].double() @ k[image, block].double().mT * logit_scale, dim=-1
                )
                for q, k in (exact, stored)
            )
            result[image, block] = (teacher.exp() * (teacher - kept)).sum(dim=-1)
    return result


class TokenErrors:
    """What storing tokens changes in their direction and in the loss of REPA.

    The loss is measured on predictions at cosine 0.5 to the exact tokens, in directions drawn once: as far as
    a trained projector comes, roughly. What a prediction p loses or gains is
    cos(p, z) − cos(p, ẑ) ≤ ‖z/‖z‖ − ẑ/‖ẑ‖‖ = √(2 − 2·cos(z, ẑ)).

    Args:
        tokens: T.
        width: D.
    """

    def __init__(self, tokens: int, width: int) -> None:
        generator = torch.Generator().manual_seed(PREDICTION_SEED)
        self._drawn = torch.randn((tokens, width), dtype=torch.float64, generator=generator)

    def __call__(self, exact: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the errors of each token.

        Args:
            exact: tokens as computed, float32 ``[B, T, D]``.
            stored: tokens as read back, of the same shape.

        Returns:
            1 − cos(z, ẑ) and cos(p, z) − cos(p, ẑ), each float64 ``[B, T]``.
        """
        truth, kept = (F.normalize(each.double(), dim=-1) for each in (exact, stored))
        drawn = self._drawn.to(truth.device)
        across = F.normalize(drawn - (drawn * truth).sum(-1, keepdim=True) * truth, dim=-1)
        prediction = PREDICTION_COSINE * truth + (1 - PREDICTION_COSINE**2) ** 0.5 * across
        # ½‖z − ẑ‖² of unit vectors is 1 − cos, without its cancellation
        error = (truth - kept).square().sum(-1) / 2
        return error, (prediction * (truth - kept)).sum(-1)
