"""How to sample, and the solvers that there are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ...data.errors import RepaError
from ..models.timesteps import STEPS
from . import stochastic_heun

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ..objectives.base import Objective
    from .state import StateShape

LAST_NOISY_TIME = 0.04
MOST_STEPS = 100_000
SOLVERS: Mapping[str, range] = {
    "euler": range(1, MOST_STEPS + 1),
    "heun": range(1, MOST_STEPS + 1),
    "sde": range(2, MOST_STEPS + 1),
    stochastic_heun.NAME: range(2, MOST_STEPS + 1),
    "ddpm": range(1, STEPS + 1),
    "ddim": range(1, STEPS + 1),
}
"""Solver → how many steps it can take."""
STOCHASTIC: Mapping[str, float] = {
    "sde": LAST_NOISY_TIME,
    stochastic_heun.NAME: stochastic_heun.LAST_NOISY_TIME,
}
"""Solver of the reverse SDE → time of its last step, which draws no noise."""
SHIFTABLE = ("euler", "heun")
GUIDANCE_CHANNELS = ("all", "three")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to sample.

    Attributes:
        solver: one of `SOLVERS`; empty takes the first that the objective offers.
        steps: number of times the state is advanced.
        guidance: w; 1 means none.
        guidance_cls: w of the vectors beside the latent; None takes `guidance`.
        guidance_channels: of the latent that are guided, ``all``, or as in the released DiT and SiT the first
            ``three``.
        interval: low and high time between which guidance acts.
        shift: a, of the times of Euler and Heun; 1 leaves them equidistant, less takes more near noise.

    Raises:
        RepaError: an unknown solver, a number of steps or a shift that it cannot take, or an interval outside
            [0, 1].
    """

    solver: str = ""
    steps: int = 50
    guidance: float = 1.0
    guidance_cls: float | None = None
    guidance_channels: str = "all"
    interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.solver and self.solver not in SOLVERS:
            raise RepaError(
                f"solver {self.solver!r} is unknown",
                f"the solvers are {', '.join(SOLVERS)}",
                field="--solver",
            )
        possible = SOLVERS.get(self.solver, range(1, MOST_STEPS + 1))
        if self.steps not in possible:
            few = self.steps < possible.start
            raise RepaError(
                f"{self.steps} sampling steps are too {'few' if few else 'many'} for "
                f"{self.solver or 'any solver'}",
                f"take {possible.start} or more" if few else f"take {possible[-1]:,} or fewer",
                field="--steps",
            )
        if self.guidance_channels not in GUIDANCE_CHANNELS:
            raise RepaError(
                f"guidance channels {self.guidance_channels!r} are unknown",
                f"choose {' or '.join(GUIDANCE_CHANNELS)}",
                field="--guidance-channels",
            )
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise RepaError(
                f"guidance interval [{low}, {high}] is not inside [0, 1] with low ≤ high",
                "set --interval to such times",
                field="--interval",
            )
        if not 0 < self.shift < math.inf:
            raise RepaError(
                f"a shift of times by {self.shift} is none", "give a finite number above 0", field="--shift"
            )
        if self.shift != 1 and self.solver not in ("", *SHIFTABLE):
            raise RepaError(
                f"{self.solver} has times of its own",
                f"leave --shift out, or take {' or '.join(SHIFTABLE)}",
                field="--shift",
            )

    def of(self, objective: Objective) -> SamplerConfig:
        """Return these settings with a solver that samples what an objective trains.

        Raises:
            RepaError: it offers no such solver, or its solver cannot take so many steps.
        """
        solver = self.solver or objective.solvers[0]
        if solver not in objective.solvers:
            raise RepaError(
                f"solver {solver} cannot sample what the network predicts, {objective.predicts}",
                f"take {' or '.join(objective.solvers)}",
                field="--solver",
            )
        return replace(self, solver=solver)

    def weights(self, shape: StateShape) -> float | Tensor:
        """Return the weight of guidance, of each number of the state where they differ.

        Those are ``[F]``, or ``[C, 1, 1]`` of a state that is the latent alone.
        """
        beside = self.guidance if self.guidance_cls is None else self.guidance_cls
        guided = 3 if self.guidance_channels == "three" else None
        return shape.weights(self.guidance, beside, guided=guided)

    def times(self) -> list[float]:
        """Return the steps + 1 times of a solver that integrates a velocity, from 1 to 0."""
        if self.solver in STOCHASTIC:
            last = STOCHASTIC[self.solver]
            noisy: list[float] = torch.linspace(1, last, self.steps, dtype=torch.float64).tolist()
            return [*noisy, 0.0]
        times: list[float] = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64).tolist()
        return times if self.shift == 1 else [t / (self.shift + (1 - self.shift) * t) for t in times]
