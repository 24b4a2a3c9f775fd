"""Linear regression from sums over batches, with a ridge, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


class LeastSquares:
    """Sums of a regression of E outputs on F features, to which batches are added.

    Args:
        features: F.
        outputs: E.
        device: where the sums lie.
    """

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        self._features = features
        width = features + outputs
        self._count = 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = torch.zeros((features, width), dtype=torch.float64, device=device)

    def add(self, features: Tensor, outputs: Tensor) -> None:
        """Add a batch, ``[N, F]`` and ``[N, E]``."""
        both = torch.cat([features.double(), outputs.double()], dim=1)
        self._count += len(both)
        self._sum += both.sum(dim=0)
        self._products += both[:, : self._features].mT @ both

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Return the weights ``[E, F]`` and the bias ``[E]`` of the least penalised squared error.

        Args:
            penalty: of a squared weight, relative to the variance of its feature; the bias has none.
        """
        mean = self._sum / self._count
        products = self._products / self._count - mean[: self._features].unsqueeze(1) * mean
        covariance, with_outputs = products[:, : self._features], products[:, self._features :]
        variance = covariance.diagonal()
        # a feature that never varies is given weight 0, not a division by 0
        ridge = torch.where(variance > 0, variance * penalty, 1.0)
        factor = torch.linalg.cholesky(covariance + torch.diag(ridge))
        weights = torch.cholesky_solve(with_outputs, factor).mT
        return weights, mean[self._features :] - weights @ mean[: self._features]
