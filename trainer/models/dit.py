"""DiT (arXiv 2212.09748), the same blocks as SiT's, trained on the steps of a diffusion chain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .capture import NOTHING, BackboneFacts, Capture, Captured
from .sit import SiT, SiTConfig
from .timesteps import step_of

if TYPE_CHECKING:
    from torch import Tensor

    from .token_groups import TokenGroups


@dataclass(frozen=True, kw_only=True)
class DiTConfig(SiTConfig):
    """Architecture of a DiT. Its fields are those of a SiT."""

    family = "DiT"
    most_tokens = 0

    @property
    def prediction_channels(self) -> int:
        """Twice the channels of the latent, for the noise and for the variance."""
        return 2 * self.in_channels

    @property
    def facts(self) -> BackboneFacts:
        """What methods may know."""
        return replace(super().facts, stepped_time=True)


class DiT(SiT):
    """The transformer from noisy latent, step and condition to noise and variance.

    State dict keys are those of DiT.

    Args:
        config: architecture.
        conditioner: embeds the condition; class labels by default.
    """

    config: DiTConfig

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor,
        capture: Capture = NOTHING,
        beside: tuple[Tensor, ...] = (),
        *,
        groups: TokenGroups | None = None,
    ) -> Captured:
        """Predict what the objective trains, noise and variance in the published models.

        Args:
            x: noisy latent ``[B, C, h, w]``.
            t: time in [0, 1], ``[B]``, or of each group ``[B, G]``; data at 0, noise at 1. The network sees
                its step from 0 to 999.
            condition: what the conditioner embeds; labels int64 ``[B]`` by default.
            capture: activations to return.
            beside: none.
            groups: of the tokens, where an image has several times.

        Returns:
            The prediction ``[B, 2C, h, w]`` (none after an early stop) and the activations.

        Raises:
            ValueError: the capture names a block that does not run, or there are vectors beside the latent.
        """
        return super().forward(x, step_of(t).float(), condition, capture, beside, groups=groups)
