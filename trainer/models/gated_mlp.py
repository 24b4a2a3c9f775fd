"""The gated MLP of newer transformers, SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGlu(nn.Module):
    """fc2(silu(fc1_g x) ⊙ fc1_x x), three linear maps without bias.

    Args:
        width: D, channels of a token.
        hidden: channels of gate and value.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(width, hidden, bias=False)
        self.fc1_x = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T, D]``."""
        output: Tensor = self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x))
        return output
