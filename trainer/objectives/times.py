"""Laws of the times at which the network trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from ...data.errors import RepaError
from .paths import Interpolant

TimeLaw: TypeAlias = Callable[[int, Interpolant, torch.Generator], Tensor]
"""(number of samples, path, generator) → times float32 ``[B]`` in [0, 1], on the generator's device."""


def uniform_times(count: int, path: Interpolant, generator: torch.Generator) -> Tensor:
    """Uniform on [0, 1), the default of REPA."""
    del path
    return torch.rand(count, generator=generator, device=generator.device)


def lognormal_times(count: int, path: Interpolant, generator: torch.Generator) -> Tensor:
    """Draw σ/α = exp N(0, 1), carried to the path's time (EDM's law as REPA offers it)."""
    return path.time_of_ratio(torch.randn(count, generator=generator, device=generator.device).exp())


def shifted(t: Tensor, shift: float) -> Tensor:
    """Take times t to t / (a + (1 − a)·t), towards the noise for a below 1, as ``repa sample --shift`` does.

    Latents of many numbers keep more of the image at equal noise. Esser et al. (arXiv 2403.03206, section
    5.3.2) take 1 / a = √(m / n), of the numbers m of a latent and n of the one whose times were good.

    Args:
        t: times in [0, 1], of any shape.
        shift: a, above 0; 1 leaves them.
    """
    # of all forms of this the one that rounds to no time above 1
    return t if shift == 1 else t / (t + shift * (1 - t))


TIME_LAWS: Mapping[str, TimeLaw] = {"uniform": uniform_times, "lognormal": lognormal_times}


def time_law(name: str) -> TimeLaw:
    """Return the time law of a name.

    Raises:
        RepaError: the name is unknown.
    """
    if name not in TIME_LAWS:
        raise RepaError(f"time law {name!r} is unknown", f"the laws are {', '.join(TIME_LAWS)}")
    return TIME_LAWS[name]
