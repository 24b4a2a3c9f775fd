"""Stochastic Heun, the solver of the reverse SDE that GMem samples with (arXiv 2412.08781, released code).

The SDE is that of the solver ``sde``, with drift d = v − ½·2t·s and diffusion w_t = 2t. A step from t to
t − h adds its noise first and then is Heun's: x̂ = x + √(2·t·h)·ε; k₁ = d(x̂, t); k₂ = d(x̂ − h·k₁, t − h);
x ← x̂ − h·(k₁ + k₂)/2. The last step, from 0.004 to 0, is Euler's and without noise. So n times take 2·n − 1
evaluations, each one pass of the network, which gives velocity and score together. The released code calls
the network for each of the two, and twice as often.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NAME = "sde-heun"
LAST_NOISY_TIME = 0.004


def stochastic_heun_step(
    drift: Callable[[Tensor, float], Tensor], x: Tensor, t: float, t_next: float, noise: Tensor
) -> Tensor:
    """Carry a state from one time to the next.

    Args:
        drift: (state, time) → d of the state's shape.
        x: state ``[B, …]``, float64.
        t: its time.
        t_next: the next, below t.
        noise: standard normal, of x's shape.

    Returns:
        The state at `t_next`.
    """
    h = t - t_next
    noisy = x + math.sqrt(2 * t * h) * noise
    first = drift(noisy, t)
    second = drift(noisy - h * first, t_next)
    return noisy - h * (first + second) / 2
