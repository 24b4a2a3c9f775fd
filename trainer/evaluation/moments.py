"""Mean and covariance of features, summed in float64 while the features stream by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...data.errors import RepaError

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    Rows: TypeAlias = NDArray[np.floating] | torch.Tensor
    """Features of images ``[N, D]``, an image a row."""

BLOCK = 256
"""Rows that are summed at once, whatever the batch size was."""


@dataclass(frozen=True)
class Moments:
    """Hold the normal distribution fitted to a set of features.

    Attributes:
        mean: float64 ``[D]``.
        covariance: float64 ``[D, D]``, unbiased (divided by N − 1).
        count: how many rows it was measured on; 0 where a statistics file does not say.

    Raises:
        RepaError: the shapes do not fit, or a value is not finite.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", np.asarray(self.mean, dtype=np.float64))
        object.__setattr__(self, "covariance", np.asarray(self.covariance, dtype=np.float64))
        width = self.mean.shape[0] if self.mean.ndim == 1 else 0
        if width == 0 or self.covariance.shape != (width, width):
            raise RepaError(
                f"a mean {self.mean.shape} and a covariance {self.covariance.shape} do not fit each other",
                "give [D] and [D, D] of one feature space",
                field="reference",
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise RepaError(
                "a mean or covariance of features holds values that are not finite",
                "measure it again from features that are finite",
                field="reference",
            )


@dataclass
class MomentSums:
    """Sum the moments of features that come in batches.

    Rows are cut into blocks of 256 in the order they come, so that the batch size does not change a bit.
    Blocks are joined as in Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing
    sample variances", 1979), which loses no digits to a mean far from 0.
    """

    count: int = 0
    _mean: NDArray[np.float64] | None = None
    _scatter: NDArray[np.float64] | None = None
    _waiting: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, features: Rows) -> None:
        """Add the features of a batch.

        Args:
            features: ``[N, D]`` of any float dtype, on any device.

        Raises:
            RepaError: they are not ``[N, D]`` of the earlier batches' D, or not finite.
        """
        rows = as_rows(features)
        known = self._waiting[0].shape[1] if self._waiting else None
        known = len(self._mean) if self._mean is not None else known
        if known is not None and rows.shape[1] != known:
            raise RepaError(
                f"features of {rows.shape[1]} channels come after features of {known}",
                "take all from one model",
                field="features",
            )
        self._waiting.append(rows)
        waiting = sum(map(len, self._waiting))
        if waiting >= BLOCK:
            joined = np.concatenate(self._waiting)
            whole = waiting - waiting % BLOCK
            for start in range(0, whole, BLOCK):
                self._join(joined[start : start + BLOCK])
            self._waiting = [joined[whole:]] if whole < waiting else []

    def moments(self) -> Moments:
        """Return the mean and covariance of all rows added so far.

        Raises:
            RepaError: there are fewer than 2 rows.
        """
        total = MomentSums(
            self.count,
            None if self._mean is None else self._mean.copy(),
            None if self._scatter is None else self._scatter.copy(),
        )
        if self._waiting:
            total._join(np.concatenate(self._waiting))
        if total._mean is None or total._scatter is None or total.count < 2:
            raise RepaError(
                f"the covariance of {total.count} images does not exist",
                "take at least 2 images",
                field="features",
            )
        return Moments(total._mean, total._scatter / (total.count - 1), total.count)

    def _join(self, block: NDArray[np.float64]) -> None:
        mean = block.mean(axis=0)
        centred = block - mean
        scatter = centred.T @ centred
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = len(block), mean, scatter
            return
        total = self.count + len(block)
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(shift, shift) * (self.count * len(block) / total)
        self._mean = self._mean + shift * (len(block) / total)
        self.count = total


def moments_of(features: Rows) -> Moments:
    """Return the mean and covariance of features.

    Args:
        features: ``[N, D]``, N at least 2.

    Raises:
        RepaError: they are not ``[N, D]``, too few, or not finite.
    """
    sums = MomentSums()
    sums.add(features)
    return sums.moments()


def as_rows(features: Rows) -> NDArray[np.float64]:
    """Return features as a float64 array.

    Args:
        features: ``[N, D]``; trailing axes are flattened, channels last stay last.

    Raises:
        RepaError: there is no row axis and no channel axis, or a value is not finite.
    """
    if isinstance(features, torch.Tensor):
        values = features.detach().to("cpu", torch.float64).numpy()
    else:
        values = np.asarray(features, dtype=np.float64)
    if values.ndim < 2 or values.size == 0:
        raise RepaError(
            f"features of shape {list(values.shape)} are not [N, D]",
            "give one row of numbers an image",
            field="features",
        )
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        raise RepaError(
            f"features of {len(rows)} images, the first is {rows[0]}, are not finite",
            "look at these images: a network that overflows in half precision does this too",
            field="features",
        )
    return values.reshape(len(values), -1)
