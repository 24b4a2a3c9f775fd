"""Samples of a frozen denoiser with its soft tokens, by the schedulers of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.denoiser_facts import SD3, SD15, SDXL
from ..models.stable_diffusion import make_scheduler
from ..step.randomness import generator_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..models.stable_diffusion import Denoiser
    from .tokens import SoftTokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the published samples of a kind of denoiser are made.

    Attributes:
        steps: of the scheduler.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    steps: int
    guidance: float


PUBLISHED: Mapping[str, Sampling] = {
    SD15: Sampling(steps=30, guidance=7.0),
    SDXL: Sampling(steps=30, guidance=7.0),
    SD3: Sampling(steps=28, guidance=4.0),
}
"""Kind of denoiser → DDIM of the U-Nets, Euler of Stable Diffusion 3 (arXiv 2503.08250)."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Text of a batch.

    Attributes:
        states: ``[B, S, E]``.
        pooled: ``[B, P]``; None of denoisers that take none.
    """

    states: Tensor
    pooled: Tensor | None

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.states)

    def rows(self, rows: slice) -> Text:
        """Return some of them."""
        pooled = None if self.pooled is None else self.pooled[rows]
        return Text(states=self.states[rows], pooled=pooled)

    def expand(self, count: int) -> Text:
        """Return one text as many times."""
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return Text(states=self.states.expand(count, -1, -1), pooled=pooled)

    def to(self, device: torch.device) -> Text:
        """Return it on a device, in float32."""
        pooled = None if self.pooled is None else self.pooled.to(device, torch.float32)
        return Text(states=self.states.to(device, torch.float32), pooled=pooled)


def initial_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Return the noise of samples ``first, first + 1, …``, each a function of the seed and its number.

    Args:
        seed: of the samples.
        first: number of the first.
        count: B.
        shape: ``(C, h, w)`` of a latent.
    """
    drawn = [
        torch.randn(shape, generator=generator_for(seed, "softrepa sample", number))
        for number in range(first, first + count)
    ]
    return torch.stack(drawn)


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    soft: SoftTokens | None,
    text: Text,
    null: Text,
    noise: Tensor,
    *,
    steps: int,
    guidance: float,
    size: int,
) -> Tensor:
    """Sample scaled latents ``[B, C, h, w]``. The tokens are in both passes of guidance, as in training.

    Args:
        denoiser: on its device.
        soft: on the same device; None samples the plain model.
        text: of the samples.
        null: one text, the empty one.
        noise: of `initial_noise`.
        steps: of the scheduler.
        guidance: w of null + w·(text − null); 1 asks the denoiser for the text alone.
        size: side in pixels of the images.
    """
    scheduler = make_scheduler(denoiser.facts)
    device = next(denoiser.model.parameters()).device
    scheduler.set_timesteps(steps, device=device)
    count = len(text)
    given, nothing = text.to(device), null.to(device).expand(count)
    x: Tensor = noise.to(device) * getattr(scheduler, "init_noise_sigma", 1.0)

    def predict(of: Text, t: Tensor) -> Tensor:
        times = t.expand(count)
        tokens = None if soft is None else soft(times)
        return denoiser.predict(x, times, of.states, of.pooled, tokens, size).float()

    for t in scheduler.timesteps:
        prediction = predict(given, t)
        if guidance != 1:
            without = predict(nothing, t)
            prediction = without + guidance * (prediction - without)
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return x
