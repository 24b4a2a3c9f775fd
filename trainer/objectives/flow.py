"""Flow matching, where the network predicts the velocity of the path (SiT, arXiv 2401.08740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Le

from .base import Noised, require_prediction, squared_error
from .path_objective import PathConfig, PathObjective

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ..models.capture import Captured

VELOCITY = "velocity"


@dataclass(frozen=True, kw_only=True)
class FlowConfig(PathConfig):
    """Settings of flow matching. The defaults are REPA's.

    Attributes:
        path: interpolant between data and noise.
        times: law of the training times, where the method has none of its own.
        shift: a, takes times t of that law to t / (a + (1 − a)·t); 1 leaves them, less takes more near noise.
    """

    path: Literal["linear", "cosine"] = "linear"
    times: Literal["uniform", "lognormal"] = "uniform"
    shift: Annotated[float, Gt(0), Le(1_000)] = 1.0


class Flow(PathObjective):
    """L_v = mean of (v_θ(x_t, t) − dx_t/dt)²."""

    config_class = FlowConfig
    terms = (VELOCITY,)
    predicts = "a velocity"
    vectors = True
    token_times = True
    has_target = True
    config: FlowConfig

    def target(self, noised: Noised) -> Tensor:
        """Return the velocity of the path."""
        return self.path.velocity(noised.x0, noised.noise, noised.t)

    def losses(self, captured: Captured, noised: Noised) -> Mapping[str, Tensor]:
        """Return the velocity loss, per sample."""
        return {VELOCITY: squared_error(require_prediction(captured), self.target(noised))}

    def velocity(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the prediction, which is the velocity."""
        del x, t
        return prediction
