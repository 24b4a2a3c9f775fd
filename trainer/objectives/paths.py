"""Paths x_t = α(t)·x + σ(t)·ε between data and noise, with their velocity and score.

Time runs from data (t = 0) to noise (t = 1), and the velocity is dx_t/dt = α'·x + σ'·ε
(stochastic interpolants, arXiv 2303.08797; SiT, arXiv 2401.08740). Everything keeps the dtype it is given.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Interpolant(ABC):
    """A path x_t = α(t)·x + σ(t)·ε with α(0) = σ(1) = 1 and α(1) = σ(0) = 0.

    Attributes:
        name: how configurations call it.
    """

    name: str

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight α of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight σ of the noise."""

    @abstractmethod
    def alpha_rate(self, t: Tensor) -> Tensor:
        """Compute dα/dt."""

    @abstractmethod
    def sigma_rate(self, t: Tensor) -> Tensor:
        """Compute dσ/dt."""

    @abstractmethod
    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        """Compute the time at which σ(t)/α(t) has the given value in [0, ∞)."""

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute x_t = α(t)·x + σ(t)·ε.

        Args:
            x0: data ``[B, …]``.
            noise: ε, of the same shape.
            t: times ``[B]``, or of as many axes as the data.
        """
        t = _like(t, x0)
        return self.alpha(t) * x0 + self.sigma(t) * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute the training target dx_t/dt = α'(t)·x + σ'(t)·ε, which is ε − x on the linear path."""
        t = _like(t, x0)
        return self.alpha_rate(t) * x0 + self.sigma_rate(t) * noise

    def score(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Compute ∇ log p_t(x) = −E[ε | x_t = x] / σ, from the velocity in closed form.

        x = α·x₀ + σ·ε and v = α'·x₀ + σ'·ε give ε = (α'·x − α·v) / (α'·σ − α·σ'); the denominator is −1 on
        the linear path and −π/2 on the cosine path. Singular at t = 0, where σ = 0.
        """
        t = _like(t, x)
        alpha, sigma, alpha_rate, sigma_rate = (
            self.alpha(t),
            self.sigma(t),
            self.alpha_rate(t),
            self.sigma_rate(t),
        )
        noise = (alpha_rate * x - alpha * velocity) / (alpha_rate * sigma - alpha * sigma_rate)
        return -noise / sigma


class Linear(Interpolant):
    """α = 1 − t, σ = t."""

    name = "linear"

    def alpha(self, t: Tensor) -> Tensor:
        """Compute 1 − t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """Return the time itself."""
        return t

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return −1."""
        return -torch.ones_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        """Compute r / (1 + r)."""
        return ratio / (1 + ratio)


class Cosine(Interpolant):
    """α = cos(πt/2), σ = sin(πt/2)."""

    name = "cosine"

    def alpha(self, t: Tensor) -> Tensor:
        """Compute cos(πt/2)."""
        return torch.cos(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        """Compute sin(πt/2)."""
        return torch.sin(t * (math.pi / 2))

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Compute −π/2 · sin(πt/2)."""
        return torch.sin(t * (math.pi / 2)) * (-math.pi / 2)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Compute π/2 · cos(πt/2)."""
        return torch.cos(t * (math.pi / 2)) * (math.pi / 2)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        """Compute 2/π · atan(r)."""
        return torch.atan(ratio) * (2 / math.pi)


INTERPOLANTS: Mapping[str, Interpolant] = {path.name: path for path in (Linear(), Cosine())}


def interpolant(name: str) -> Interpolant:
    """Return the path of a name.

    Raises:
        RepaError: the name is unknown.
    """
    if name not in INTERPOLANTS:
        raise RepaError(f"path {name!r} is unknown", f"the paths are {', '.join(INTERPOLANTS)}")
    return INTERPOLANTS[name]


def _like(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times ``[B]`` to as many axes as x has, for broadcasting, and leave such as have them."""
    return t if t.ndim == x.ndim else t.reshape(-1, *(1,) * (x.ndim - 1))
