"""The channel-idle feed-forward network of RePaViT, and its exact merge (arXiv 2505.21847, § 3).

With the first A of H hidden channels active, act(·) on them and nothing on the others, a block computes

    y = W2 · BN2([act(h_A), h_I]) + b2,   h = W1 · BN1(x) + b1,

where either norm may be missing: a block that keeps its LayerNorm has it before x, and no norm within. Each
norm in evaluation is a line per channel, and the idle channels are a line too, so that

    y = U · act(V·x + c) + W·x + b

has the same values in (2A + D)·D multiplications a token, not 2·H·D.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ...data.errors import RepaError


def active_channels(hidden: int, idle: float) -> int:
    """Return how many channels stay active, ⌈hidden · (1 − idle)⌉ in floating point as published.

    Args:
        hidden: H.
        idle: θ, the share that is idle, above 0 and up to 1.

    Raises:
        RepaError: no channel would be active, or none idle, and θ is not 1.
    """
    active = math.ceil(hidden * (1 - idle))
    if not 0 <= idle <= 1 or (active == 0 and idle != 1) or (active == hidden and idle != 0):
        raise RepaError(
            f"--idle {idle:g} of {hidden} channels leaves {active} active",
            f"give a share between {1 / hidden:.2g} and {1 - 1 / hidden:.2g}, as 0.75, or 1",
            field="--idle",
        )
    return active


class MergedFeedForward(nn.Module):
    """What a channel-idle network is after the merge. See the module for its formula.

    Args:
        width: D.
        active: A; with none only the line is left.
        activation: act.
    """

    def __init__(self, width: int, active: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, active) if active else None
        self.fc2 = nn.Linear(active, width, bias=False) if active else None
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[…, D]`` of tokens ``[…, D]``."""
        line: Tensor = self.linear(x)
        if self.fc1 is None or self.fc2 is None:
            return line
        curve: Tensor = self.fc2(self.act(self.fc1(x)))
        return line + curve


class IdleFeedForward(nn.Module):
    """A feed-forward network of which the first A hidden channels alone are active, as it is trained.

    Args:
        width: D.
        hidden: H.
        active: A.
        activation: act, of one channel at a time.
        batch_norms: a BatchNorm before either layer, as published; the block's own norm is left out then.
    """

    def __init__(
        self, width: int, hidden: int, active: int, activation: nn.Module, *, batch_norms: bool
    ) -> None:
        super().__init__()
        self.active = active
        self.norm1 = nn.BatchNorm1d(width) if batch_norms else None
        self.fc1 = nn.Linear(width, hidden)
        self.act = activation
        self.norm2 = nn.BatchNorm1d(hidden) if batch_norms else None
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[…, D]`` of tokens ``[…, D]``. Statistics of a batch are over all of its tokens."""
        h = self.fc1(_over_tokens(self.norm1, x))
        h = torch.cat([self.act(h[..., : self.active]), h[..., self.active :]], dim=-1)
        y: Tensor = self.fc2(_over_tokens(self.norm2, h))
        return y

    @torch.no_grad()
    def merge(self, layer_scale: Tensor | None = None, *, shortcut: bool = False) -> MergedFeedForward:
        """Return the network of the same values without idle channels, computed in float64.

        Args:
            layer_scale: γ ``[D]`` that the block multiplies the result by, folded in.
            shortcut: fold x + … in too, which only a block without a norm before this network allows.

        Raises:
            RepaError: it is in training mode, in which a norm is no fixed line.
        """
        if self.training:
            raise RepaError(
                "the channel-idle network is in training mode, where its norms depend on the batch",
                "call eval() first",
            )
        (scale1, shift1), (scale2, shift2) = _line(self.norm1), _line(self.norm2)
        w1, b1 = self.fc1.weight.double(), self.fc1.bias.double()
        w2, b2 = self.fc2.weight.double(), self.fc2.bias.double()
        b1, w1 = b1 + w1 @ shift1.expand(w1.shape[1]), w1 * scale1
        b2, w2 = b2 + w2 @ shift2.expand(w2.shape[1]), w2 * scale2
        if layer_scale is not None:
            w2, b2 = layer_scale.double().unsqueeze(1) * w2, layer_scale.double() * b2
        used, idle = slice(None, self.active), slice(self.active, None)
        line = w2[:, idle] @ w1[idle]
        if shortcut:
            line = line + torch.eye(len(line), dtype=line.dtype, device=line.device)
        merged = MergedFeedForward(w1.shape[1], self.active, copy.deepcopy(self.act))
        merged.to(self.fc1.weight)
        merged.linear.weight.copy_(line)
        merged.linear.bias.copy_(w2[:, idle] @ b1[idle] + b2)
        if merged.fc1 is not None and merged.fc2 is not None:
            merged.fc1.weight.copy_(w1[used])
            merged.fc1.bias.copy_(b1[used])
            merged.fc2.weight.copy_(w2[:, used])
        return merged.eval()


def _over_tokens(norm: nn.BatchNorm1d | None, values: Tensor) -> Tensor:
    """Return values ``[…, C]`` after a norm whose statistics are over everything but the channels."""
    if norm is None:
        return values
    found: Tensor = norm(values.flatten(0, -2)).reshape(values.shape)
    return found


def _line(norm: nn.BatchNorm1d | None) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift of each channel in evaluation, float64 ``[C]``, or ``[1]`` of none."""
    if norm is None:
        return torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert norm.running_mean is not None, "statistics are tracked"
    assert norm.running_var is not None, "statistics are tracked"
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - scale * norm.running_mean.double()
