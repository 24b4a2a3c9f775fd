"""Objectives of a path between data and noise, whose prediction gives its velocity."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import Objective, ObjectiveConfig
from .paths import interpolant
from .times import shifted, time_law

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .times import TimeLaw

SOLVERS = ("euler", "heun", "sde", "sde-heun")
"""Names of the solvers that integrate a velocity."""


@dataclass(frozen=True, kw_only=True)
class PathConfig(ObjectiveConfig):
    """Settings of an objective of a path.

    Attributes:
        path: name of the path between data and noise.
        times: name of the law of the training times, where the method has none of its own.
        shift: of times of that law, as of `shifted`.
    """

    path: str = "linear"
    times: str = "uniform"
    shift: float = 1.0


class PathObjective(Objective):
    """Base of the objectives of a path.

    Attributes:
        path: the path of the settings.

    Args:
        config: settings.
    """

    solvers = SOLVERS
    preview_solver = "heun"
    config: PathConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.path = interpolant(config.path)

    def times(self, count: int, generator: torch.Generator, law: TimeLaw | None = None) -> Tensor:
        """Return training times float32 ``[B]`` by the law of the method, or the configured one."""
        if law is not None:
            return law(count, self.path, generator)
        return shifted(time_law(self.config.times)(count, self.path, generator), self.config.shift)

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t on the path."""
        return self.path.interpolate(x0, noise, t)

    @abstractmethod
    def velocity(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return dx_t/dt, which the samplers integrate.

        Args:
            prediction: of the network ``[B, C, h, w]``, float64.
            x: the state it was given, of that shape.
            t: its times ``[B]`` in (0, 1], float64.
        """
