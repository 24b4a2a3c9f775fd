"""The gated MLP of newer transformers, SwiGLU (arXiv 2002.05202), in the two layouts that there are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGlu(nn.Module):
    """fc2(silu(fc1_g x) ⊙ fc1_x x), three linear maps without bias, as SiT↓ has them.

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


class PackedSwiGlu(nn.Module):
    """w3(silu(gate) ⊙ value) with gate and value of one map w12, both maps with bias.

    The layout and the names of LightningDiT's published weights.

    Args:
        width: D, channels of a token.
        hidden: channels of gate and value.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T, D]``."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        output: Tensor = self.w3(F.silu(gate) * value)
        return output


def two_thirds(width: int, ratio: int) -> int:
    """Return the hidden channels with which a gated MLP has as many weights as one of `ratio` · width."""
    return int(2 / 3 * (ratio * width))
