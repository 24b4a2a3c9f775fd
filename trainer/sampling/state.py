"""The state that a sampler carries, the latent alone or with the vectors that are denoised beside it.

Of several parts it is one vector per sample, so that no solver knows of parts: steps, drift and noise of a
flow act on each number alone, and only guidance may weigh the parts apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..models.base import BackboneConfig


@dataclass(frozen=True, kw_only=True)
class StateShape:
    """The parts of a state.

    Attributes:
        latent: shape of the latent, ``(C, h, w)``.
        widths: channels of each vector beside it.
    """

    latent: tuple[int, ...]
    widths: tuple[int, ...] = ()

    def pack(self, latent: Tensor, beside: Sequence[Tensor] = ()) -> Tensor:
        """Return the state ``[B, F]`` of latents and vectors, or the latents alone as they are."""
        return torch.cat([latent.flatten(1), *beside], dim=1) if self.widths else latent

    def unpack(self, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return latents ``[B, C, h, w]`` and vectors ``[B, D]`` of a state."""
        if not self.widths:
            return state, ()
        latent, *beside = torch.split(state, [prod(self.latent), *self.widths], dim=1)
        return latent.reshape(-1, *self.latent), tuple(beside)

    def weights(self, latent: float, beside: float, *, guided: int | None = None) -> float | Tensor:
        """Return the weight of each number of a state, or the one that all have.

        Args:
            latent: weight of the latent.
            beside: weight of the vectors.
            guided: channels of the latent that have its weight, the others have 1; None for all.

        Returns:
            The one weight, or float64 ``[F]``, ``[C, 1, 1]`` where the state is the latent alone.
        """
        channels = self.latent[0]
        alike = latent == 1 or guided is None or guided >= channels
        if alike and (not self.widths or latent == beside):
            return latent
        weights = torch.full((channels,), latent, dtype=torch.float64)
        if guided is not None:
            weights[guided:] = 1
        if not self.widths:
            return weights.reshape(-1, 1, 1)
        others = torch.full((sum(self.widths),), beside, dtype=torch.float64)
        return torch.cat([weights.repeat_interleave(prod(self.latent[1:])), others])


def state_of(config: BackboneConfig) -> StateShape:
    """Return the parts of the state of a backbone's flow."""
    return StateShape(latent=config.latent_shape, widths=config.token_widths)
