"""The chain of steps of DDPM (arXiv 2006.11239), or some of its steps (Improved DDPM, arXiv 2102.09672).

x_t = √ᾱ_t·x₀ + √(1 − ᾱ_t)·ε with ᾱ_t = Π (1 − β). The reverse of a step is a Gaussian: its mean is known
given x₀, its variance lies between β̃_t, as if x₀ were known, and β_t. All tables are float64.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

FIRST_BETA, LAST_BETA = 1e-4, 0.02


class Chain:
    """Hold the tables of the steps of a chain, float64 ``[N]`` each, from the clean end.

    Attributes:
        steps: number of each step in the chain that the network was trained on.
        betas: β, the variance that a step adds.
        signal: ᾱ after the step.
        alpha: √ᾱ, the weight of the data.
        sigma: √(1 − ᾱ), the weight of the noise.
        weight_of_clean: of x₀ in the mean of the reversed step, β·√ᾱ₋₁ / (1 − ᾱ) with ᾱ₋₁ before the step.
        weight_of_state: of x_t in that mean, (1 − ᾱ₋₁)·√(1 − β) / (1 − ᾱ).
        log_most: log β.
        log_least: log β̃ with β̃ = β·(1 − ᾱ₋₁) / (1 − ᾱ); the first step, where it is 0, has the second's.

    Args:
        betas: β of each step.
        steps: numbers of the steps.
    """

    def __init__(self, betas: Tensor, steps: Sequence[int]) -> None:
        self.steps = tuple(steps)
        self.betas = betas
        self.signal = torch.cumprod(1 - betas, dim=0)
        before = _before(self.signal)
        self.alpha = self.signal.sqrt()
        self.sigma = (1 - self.signal).sqrt()
        self.weight_of_clean = betas * before.sqrt() / (1 - self.signal)
        self.weight_of_state = (1 - before) * (1 - betas).sqrt() / (1 - self.signal)
        self.log_most = betas.log()
        least = betas * (1 - before) / (1 - self.signal)
        # a chain of one step has no second: nothing is drawn of it
        self.log_least = torch.cat([least[1:2], least[1:]]).log() if len(betas) > 1 else self.log_most

    def __len__(self) -> int:
        return len(self.steps)

    def to(self, device: torch.device) -> Self:
        """Return the chain with its tables on a device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        return moved

    def only(self, steps: Sequence[int]) -> Chain:
        """Return the chain of some of the steps, with the same ᾱ after each of them.

        Args:
            steps: indices of the steps of this chain, ascending.
        """
        signal = self.signal[torch.tensor(steps)]
        return Chain(1 - signal / _before(signal), [self.steps[step] for step in steps])


def linear_chain(count: int) -> Chain:
    """Return the chain whose β rises on a line from 1e-4 to 0.02."""
    betas = torch.linspace(FIRST_BETA, LAST_BETA, count, dtype=torch.float64)
    return Chain(betas, range(count))


def even_steps(count: int, of: int) -> list[int]:
    """Return so many steps of a chain, evenly spaced, with both ends.

    One step is the noisy end.

    Args:
        count: how many.
        of: length of the chain.
    """
    if count == 1:
        return [of - 1]
    return [round(index * (of - 1) / (count - 1)) for index in range(count)]


def _before(signal: Tensor) -> Tensor:
    """Return ᾱ before each step, 1 before the first."""
    return torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
