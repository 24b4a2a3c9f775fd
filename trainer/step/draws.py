"""Everything random of a training step, drawn at once for the whole step of a rank.

Drawing per step and slicing per micro-batch makes accumulation invisible: one micro-batch of eight images and
two of four see the same draws. Each quantity has its own stream, so that a method with another law of time or
without label dropout still sees the noise of its baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .randomness import derived_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..models.conditioning import Conditioner
    from ..objectives.token_times import TokenTimes

    Times = Callable[[int, torch.Generator], Tensor]
    Own = Callable[[int, torch.Generator], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Random quantities of B images.

    Attributes:
        posterior: noise of the autoencoder's posterior ``[B, C, h, w]``; None of latents that are no draws.
        noise: ε of the path ``[B, C, h, w]``.
        t: times ``[B]``, or of the groups of tokens ``[B, G]``.
        dropped: which images lose their condition, bool ``[B]``.
        beside: name → ε ``[B, D]`` of what is denoised beside the latent.
        own: what the method draws for its losses by name, ``[B, …]`` each.
        groups: group of each token, int64 ``[B, T]``; None where an image has one time.
    """

    posterior: Tensor | None
    noise: Tensor
    t: Tensor
    dropped: Tensor
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Tensor | None = None

    def micro_batch(self, index: int, size: int) -> Draws:
        """Return the share of micro-batch `index` of `size` images."""
        share = slice(index * size, (index + 1) * size)
        return Draws(
            posterior=None if self.posterior is None else self.posterior[share],
            noise=self.noise[share],
            t=self.t[share],
            dropped=self.dropped[share],
            beside={name: noise[share] for name, noise in self.beside.items()},
            own={name: values[share] for name, values in self.own.items()},
            groups=None if self.groups is None else self.groups[share],
        )


class StepDraws:
    """Draws of a rank, step by step. It keeps those of the step at hand for its micro-batches.

    Args:
        seed: of the run.
        rank: global rank.
        device: where to draw.
    """

    def __init__(self, *, seed: int, rank: int, device: torch.device) -> None:
        self._seed = seed
        self._rank = rank
        # one generator, seeded anew for each quantity: constructing them costs more than seeding on CUDA
        self._generator = torch.Generator(device)
        self._step = -1
        self._draws: Draws | None = None

    def stream(self, name: str, step: int) -> torch.Generator:
        """Set the generator to the start of a named stream. It is valid until the next call."""
        return self._generator.manual_seed(derived_seed(self._seed, name, self._rank, step))

    def of_step(
        self,
        step: int,
        count: int,
        shape: tuple[int, ...],
        times: Times,
        conditioner: Conditioner,
        beside: Mapping[str, int] | None = None,
        own: Own | None = None,
        token_times: tuple[TokenTimes, int] | None = None,
        *,
        posterior: bool = True,
    ) -> Draws:
        """Return the draws of a step.

        Args:
            step: the optimiser step.
            count: images of the rank's whole step.
            shape: of one latent, ``(C, h, w)``.
            times: (number of samples, generator) → times ``[B]``.
            conditioner: draws which images lose their condition.
            beside: name → channels of what is denoised beside the latent.
            own: (number of samples, generator) → what the method draws for its losses; None draws nothing.
            token_times: which times the tokens of an image have, and how many tokens; None for one time.
            posterior: whether latents are draws.
        """
        if self._draws is None or self._step != step:
            if token_times is None:
                t, groups = times(count, self.stream("time", step)), None
            else:
                law, tokens = token_times
                t, groups = law.draw(count, tokens, times, lambda name: self.stream(name, step))
            self._draws = Draws(
                posterior=self._normal("posterior", step, (count, *shape)) if posterior else None,
                noise=self._normal("noise", step, (count, *shape)),
                t=t,
                dropped=conditioner.dropped(count, self.stream("drop", step)),
                beside={
                    name: self._normal(f"noise of {name}", step, (count, width))
                    for name, width in (beside or {}).items()
                },
                own={} if own is None else own(count, self.stream("method", step)),
                groups=groups,
            )
            self._step = step
        return self._draws

    def _normal(self, name: str, step: int, shape: tuple[int, ...]) -> Tensor:
        generator = self.stream(name, step)
        return torch.randn(shape, generator=generator, device=generator.device)
