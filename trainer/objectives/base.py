"""The objective contract, which says what the network predicts, along which path, at which times.

An objective is one file with an `ObjectiveConfig` and an `Objective`, and one line in `registry`. No other
file knows what a prediction means: the training step asks for its loss, and it names the solvers that make
images of it. One whose prediction gives the velocity of a path is a `PathObjective`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..models.capture import Captured
    from .times import TimeLaw


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Settings of an objective. Each objective's are a frozen subclass."""


@dataclass(frozen=True, kw_only=True)
class Noised:
    """What the network is given, and what it was made from.

    Attributes:
        x0: scaled latent ``[B, C, h, w]``.
        noise: ε, of the same shape.
        t: times ``[B]`` in [0, 1], or of each pixel ``[B, 1, h, w]``; data at 0, noise at 1.
        x_t: the noisy latent, of x0's shape.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    x_t: Tensor


class Objective(ABC):
    """Base of all objectives.

    Attributes:
        config_class: its settings.
        terms: names of the loss terms, as metrics.csv calls them.
        predicts: what the network predicts, in words.
        solvers: names of the solvers that make images of it, the default first.
        preview_solver: the one of them that makes previews; it draws no noise.
        vectors: whether all answers also take vectors ``[B, D]``, of what is denoised beside the latent.
        token_times: whether `noised` and `losses` take a time of each pixel.
        has_target: whether `target` says what a prediction is compared with.
        config: settings.

    Args:
        config: settings.
    """

    config_class: ClassVar[type[ObjectiveConfig]]
    terms: ClassVar[tuple[str, ...]]
    predicts: ClassVar[str]
    solvers: ClassVar[tuple[str, ...]]
    preview_solver: ClassVar[str]
    vectors: ClassVar[bool] = False
    token_times: ClassVar[bool] = False
    has_target: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def channels(self, latent: int) -> int:
        """Return how many channels the prediction has for a latent of so many."""
        return latent

    @abstractmethod
    def times(self, count: int, generator: torch.Generator, law: TimeLaw | None = None) -> Tensor:
        """Return training times float32 ``[B]``, on the generator's device.

        Args:
            count: B.
            generator: to draw from.
            law: of the method; None for the configured one.
        """

    @abstractmethod
    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t of latents ``[B, C, h, w]``, noise and times ``[B]`` or ``[B, 1, h, w]``."""

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Noised:
        """Return what the network is given of latents ``[B, C, h, w]``, noise and times, as `interpolate`."""
        return Noised(x0=x0, noise=noise, t=t, x_t=self.interpolate(x0, noise, t))

    def target(self, noised: Noised) -> Tensor:
        """Return what a prediction is compared with ``[B, C, h, w]``, where `has_target` says so.

        Args:
            noised: what the network was given.
        """
        raise NotImplementedError(f"{type(self).__name__} has no target")

    @abstractmethod
    def losses(self, captured: Captured, noised: Noised) -> Mapping[str, Tensor]:
        """Return each of `terms` per sample, ``[B]``. The loss is the sum of their means.

        Args:
            captured: what the network returned; of a vector beside the latent, its prediction ``[B, D]``.
            noised: what it was given.
        """


def require_prediction(captured: Captured) -> Tensor:
    """Return the prediction of a forward pass.

    Raises:
        ValueError: the backbone stopped before it.
    """
    if captured.prediction is None:
        raise ValueError("the backbone stopped before its prediction")
    return captured.prediction


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean over C, h, w of the squared difference, per sample, in float32 or better.

    Args:
        prediction: ``[B, C, h, w]``.
        target: of the same shape.

    Returns:
        ``[B]``.
    """
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
