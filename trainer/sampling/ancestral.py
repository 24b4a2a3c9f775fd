"""Steps of a diffusion chain backwards, for networks that predict noise and variance (DiT).

Of the thousand steps so many are taken, evenly spaced with both ends, with the same ᾱ after each; the network
is told the original step. The state is float64 whatever the model's dtype: at the noisy end an error of ε_θ
is one of 157 times its size in x₀. With x̂₀ = (x − √(1 − ᾱ)·ε_θ) / √ᾱ, not clipped:

- ddpm (ancestral, arXiv 2006.11239): x ← mean(x̂₀, x) + exp(½·log-variance)·ε, without noise at the last step.
- ddim with η = 0 (arXiv 2010.02502): x ← √ᾱ₋₁·x̂₀ + √(1 − ᾱ₋₁)·ε_θ.

Guidance replaces ε_θ by uncond + w·(cond − uncond) where the step's time is in the interval; the variance is
the conditional pass's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..compiling import uncompiled
from ..models.timesteps import time_of
from ..objectives.base import require_prediction
from ..objectives.chain import even_steps
from ..objectives.ddpm import log_variance_of
from .state import StateShape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ..models.base import Backbone
    from ..objectives.ddpm import Ddpm
    from .settings import SamplerConfig


@torch.no_grad()
def reverse_chain(
    backbone: Backbone,
    objective: Ddpm,
    latents: Tensor,
    condition: Tensor,
    settings: SamplerConfig,
    *,
    noises: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Carry noise to data along the reversed chain.

    Args:
        backbone: in eval mode; its conditioner gives the null condition.
        objective: what it was trained to predict.
        latents: standard normal noise ``[B, C, h, w]`` on the backbone's device.
        condition: condition of each sample ``[B, …]``.
        settings: ``ddpm`` or ``ddim``, steps and guidance.
        noises: of ancestral steps, each of the latents' shape, taken in order, one less than steps.
        generator: draws them when none are given.
        progress: called with the number of finished steps after each.

    Returns:
        float64 ``[B, C, h, w]``, scaled latents.

    Raises:
        ValueError: ancestral steps have neither noises nor generator, or too few noises.
    """
    low, high = settings.interval
    whole = objective.chain
    chain = whole.only(even_steps(settings.steps, len(whole))).to(latents.device)
    null = backbone.y_embedder.null(len(latents))
    weights = settings.weights(StateShape(latent=tuple(latents.shape[1:])))
    weights = weights.to(latents.device) if isinstance(weights, Tensor) else weights
    x = latents.double()
    draws = _draws(settings, x, noises, generator)
    for done, index in enumerate(reversed(range(len(chain))), start=1):
        time = time_of(float(chain.steps[index]))
        weight = weights if low <= time <= high else 1.0
        noise, variance = _predict(backbone, objective, x, time, condition, null, weight)
        clean = (x - chain.sigma[index] * noise) / chain.alpha[index]
        if settings.solver == "ddim":
            x = chain.alpha[index - 1] * clean + chain.sigma[index - 1] * noise if index else clean
        else:
            x = chain.weight_of_clean[index] * clean + chain.weight_of_state[index] * x
            if index:
                # filled there: a number of the host's would be waited for
                step = torch.full((1,), index, device=x.device)
                x = x + torch.exp(0.5 * log_variance_of(chain, variance, step)) * next(draws)
        if progress is not None:
            progress(done)
    return x


def _predict(
    backbone: Backbone,
    objective: Ddpm,
    x: Tensor,
    time: float,
    condition: Tensor,
    null: Tensor,
    weight: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ε_θ under guidance and v, float64 ``[B, C, h, w]``.

    Both passes are one of twice the batch; it is one pass when the weight is 1.
    """
    guided = isinstance(weight, Tensor) or weight != 1
    dtype = next(backbone.parameters()).dtype
    state = torch.cat([x, x]) if guided else x
    times = torch.full((len(state),), time, dtype=x.dtype, device=x.device)
    conditions = torch.cat([condition, null]) if guided else condition
    # a teacher's compiled average would compile again for this batch size
    with uncompiled():
        captured = backbone(state.to(dtype), times, conditions)
    noise, variance = objective.split(require_prediction(captured).double())
    if not guided:
        return noise, variance
    with_condition, without = noise.chunk(2)
    return without + weight * (with_condition - without), variance[: len(x)]


def _draws(
    settings: SamplerConfig, x: Tensor, noises: Iterable[Tensor] | None, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield the noises of ancestral steps on the state's device."""
    if settings.solver == "ddim":
        return
    if noises is not None:
        for noise in noises:
            yield noise.to(x)
        raise ValueError(
            f"too few noises were given: {settings.steps} ancestral steps take {settings.steps - 1}"
        )
    if generator is None:
        raise ValueError("ancestral steps need noises or a generator")
    while True:
        yield torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
