"""Which hidden channels of a teacher's feed-forward network stay active in its copy.

A copy has any linear path, so that of an activation only what no line of the network's input z gives is lost
when its channel is idle. With R the covariance ``[H, H]`` of these residuals over tokens and W ``[D, H]`` the
second layer's weights, keeping a set S with output weights of least squares leaves the error
tr W(R − R_S R_SS⁻¹ R_Sᵀ)Wᵀ, where R_S are the columns of S. S is chosen greedily. The channels that lessen it
most by themselves are taken, what they explain of the others is subtracted, and so on. A channel that is a
line of others, or says what a chosen one says already, is so left idle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 48
"""In which the channels are taken. Ours."""
RIDGE = 1e-3
"""Of the choice, relative to the variance of each residual. Ours; it keeps channels of noise out."""
LINE_RIDGE = 1e-8
"""Of the line, relative to the variance of each input. Ours; behind a LayerNorm one of them is a line of the
others."""


class ChannelChoice:
    """Sums over tokens, from which channels are chosen.

    Args:
        width: D.
        hidden: H.
        device: where the sums lie.
    """

    def __init__(self, width: int, hidden: int, device: torch.device) -> None:
        self._width, self._count = width, 0
        both = width + hidden
        self._sum = torch.zeros(both, dtype=torch.float64, device=device)
        self._products = torch.zeros((both, both), dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, activations: Tensor) -> None:
        """Add tokens, ``[N, D]`` as the network takes them and ``[N, H]`` after its activation."""
        both = torch.cat([inputs.double(), activations.double()], dim=1)
        self._count += len(both)
        self._sum += both.sum(dim=0)
        self._products += both.mT @ both

    def order(self, weights: Tensor, active: int) -> Tensor:
        """Return the channels, those that stay active first and either part ascending, int64 ``[H]``.

        Args:
            weights: of the second layer, ``[D, H]``.
            active: how many stay active.
        """
        left = self._residuals()
        variance = left.diagonal()
        # channels without any variance must still be divided by theirs
        left.diagonal().add_(RIDGE * variance.clamp_min(float(variance.max()) * 1e-9 + 1e-30))
        outputs = weights.double() @ left
        taken = torch.zeros(len(left), dtype=torch.bool, device=left.device)
        size = -(-active // ROUNDS)
        while (missing := active - int(taken.sum())) > 0:
            gain = outputs.square().sum(dim=0) / left.diagonal()
            best = gain.masked_fill(taken, -1.0).topk(min(size, missing)).indices
            taken[best] = True
            columns = left[:, best]
            explained = torch.cholesky_solve(columns.mT, torch.linalg.cholesky(columns[best]))
            outputs -= outputs[:, best] @ explained
            left -= columns @ explained
        return torch.cat([taken.nonzero().flatten(), (~taken).nonzero().flatten()])

    def _residuals(self) -> Tensor:
        """Return the covariance of what no line of the inputs gives, float64 ``[H, H]``."""
        mean = self._sum / self._count
        covariance = self._products / self._count - torch.outer(mean, mean)
        inputs = covariance[: self._width, : self._width]
        variance = inputs.diagonal()
        ridge = torch.where(variance > 0, variance * LINE_RIDGE, 1.0)
        factor = torch.linalg.cholesky(inputs + torch.diag(ridge))
        line = torch.linalg.solve_triangular(factor, covariance[: self._width, self._width :], upper=False)
        found: Tensor = covariance[self._width :, self._width :] - line.mT @ line
        return found
