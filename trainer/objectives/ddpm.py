"""DDPM with learned variance (Improved DDPM, arXiv 2102.09672), as DiT (arXiv 2212.09748) is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.timesteps import STEPS, step_of, time_of
from .base import Noised, Objective, ObjectiveConfig, require_prediction, squared_error
from .chain import Chain, linear_chain
from .paths import Linear
from .times import uniform_times

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..models.capture import Captured
    from .times import TimeLaw

MSE, BOUND = "mse", "vb"
SOLVERS = ("ddpm", "ddim")
HALF_BIN = 1 / 255
LAST_BIN = 0.999
LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True, kw_only=True)
class DdpmConfig(ObjectiveConfig):
    """Settings of DDPM, of which there are none."""


class Ddpm(Objective):
    """L = mean of (ε_θ − ε)² + the variational bound of the step, in bits per dimension.

    The network predicts 2C channels, ε_θ and v. The bound is of a Gaussian whose mean follows from ε_θ, and
    whose log-variance is f·log β + (1 − f)·log β̃ with f = (v + 1) / 2. Its gradient reaches v alone.
    """

    config_class = DdpmConfig
    terms = (MSE, BOUND)
    predicts = "the noise and the variance of the steps of DDPM"
    solvers = SOLVERS
    preview_solver = "ddim"
    token_times = True
    config: DdpmConfig

    def __init__(self, config: DdpmConfig) -> None:
        super().__init__(config)
        self.chain = linear_chain(STEPS)
        self._on: dict[torch.device, Chain] = {}

    def channels(self, latent: int) -> int:
        """Return the channels of the prediction, twice those of the latent."""
        return 2 * latent

    def times(self, count: int, generator: torch.Generator, law: TimeLaw | None = None) -> Tensor:
        """Return the middles of steps float32 ``[B]``, uniform unless the method has a law of its own.

        Such a law is of the linear path's times.
        """
        t = (law or uniform_times)(count, Linear(), generator)
        return time_of(step_of(t).to(t.dtype))

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t of the steps that the times belong to."""
        chain, steps = self._chain_on(x0.device), step_of(t)
        return at(chain.alpha, steps, x0) * x0 + at(chain.sigma, steps, x0) * noise

    def split(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Return ε_θ and v ``[B, C, h, w]`` of a prediction ``[B, 2C, h, w]``."""
        noise, variance = prediction.chunk(2, dim=1)
        return noise, variance

    def losses(self, captured: Captured, noised: Noised) -> Mapping[str, Tensor]:
        """Return both terms per sample, in float32 or better."""
        prediction = require_prediction(captured)
        dtype = torch.promote_types(torch.promote_types(prediction.dtype, noised.x_t.dtype), torch.float32)
        noise, variance = self.split(prediction.to(dtype))
        return {
            MSE: squared_error(noise, noised.noise),
            BOUND: self.bound(noise.detach(), variance, noised).flatten(1).mean(1),
        }

    def bound(self, noise: Tensor, variance: Tensor, noised: Noised) -> Tensor:
        """Return the variational bound of the step of each time, in bits.

        It is the divergence of the network's Gaussian from the posterior given x₀, and at step 0 the negative
        log-likelihood of x₀.

        Args:
            noise: ε_θ ``[B, C, h, w]``.
            variance: v, of that shape.
            noised: what the network was given.

        Returns:
            ``[B, C, h, w]``.
        """
        chain, steps = self._chain_on(noise.device), step_of(noised.t)
        # of the two means, without the detour by x₀, whose error grows 157-fold at the noisy end
        scale = chain.weight_of_clean * chain.sigma / chain.alpha
        difference = at(scale, steps, noise) * (noised.noise.to(noise) - noise)
        log_variance = log_variance_of(chain, variance, steps)
        least = at(chain.log_least, steps, noise)
        ratio = least - log_variance
        divergence = 0.5 * (ratio.exp() - ratio - 1 + difference.square() * torch.exp(-log_variance))
        x0 = noised.x0.to(noise)
        # at step 0 the mean is the network's x₀ itself
        likelihood = _log_likelihood(x0, x0 + difference, log_variance)
        first = (steps == 0).reshape(-1, *(1,) * (noise.ndim - 1)) if steps.ndim == 1 else steps == 0
        return torch.where(first, -likelihood, divergence) / math.log(2)

    def _chain_on(self, device: torch.device) -> Chain:
        """Return the chain on a device."""
        # copied there once, for a copy makes the host wait for the device
        if device not in self._on:
            self._on[device] = self.chain.to(device)
        return self._on[device]


def log_variance_of(chain: Chain, variance: Tensor, steps: Tensor) -> Tensor:
    """Return the log-variance of reversed steps, between that of β̃ at v = −1 and that of β at v = 1.

    Args:
        chain: of the steps.
        variance: v ``[B, C, h, w]``, unbounded.
        steps: indices of the chain ``[B]``, or of each pixel ``[B, 1, h, w]``.
    """
    fraction = (variance + 1) / 2
    most, least = (at(each, steps, variance) for each in (chain.log_most, chain.log_least))
    return fraction * most + (1 - fraction) * least


def _log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log-probability of the bin of x₀ under a Gaussian, with DDPM's bins of 8-bit pixels.

    Latents pass ±1, where the bins are open: a known oddity of the published models, one step in a thousand.
    """
    precision = torch.exp(-0.5 * log_variance)
    above = _normal_cdf(precision * (x0 - mean + HALF_BIN))
    below = _normal_cdf(precision * (x0 - mean - HALF_BIN))
    inside = torch.where(x0 > LAST_BIN, 1 - below, above - below)
    return torch.where(x0 < -LAST_BIN, above, inside).clamp(min=LEAST_PROBABILITY).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """Approximate the normal distribution function by a hyperbolic tangent, as the published loss."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def at(table: Tensor, steps: Tensor, like: Tensor) -> Tensor:
    """Look steps up in a float64 table, shaped to multiply `like` and in its dtype."""
    values = table[steps].to(like.dtype)
    return values if values.ndim == like.ndim else values.reshape(-1, *(1,) * (like.ndim - 1))
