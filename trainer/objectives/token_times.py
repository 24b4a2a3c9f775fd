"""Several times in one image, each of a group of its tokens (Self-Flow's dual-timestep scheduling)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Times: TypeAlias = Callable[[int, torch.Generator], Tensor]
"""(number of samples, generator) → times ``[B]``."""


@dataclass(frozen=True, kw_only=True)
class TokenTimes:
    """Tokens that fall at random into groups of exact sizes, each group with its own time.

    The last group has the time that the image would have without groups, from the same stream: what is in it
    sees what its baseline sees.

    Attributes:
        shares: part of an image's tokens that is in each group, in sum 1.
        separate: whether a token attends to the tokens of its own group alone.
        one_time: whether all groups have the last one's time.
        whole: probability that all of an image is in the last group.
    """

    shares: tuple[float, ...]
    separate: bool = False
    one_time: bool = False
    whole: float = 0.0

    def sizes(self, tokens: int) -> tuple[int, ...]:
        """Return the tokens of each group, rounded down, what is left going to the largest remainders."""
        exact = [share * tokens for share in self.shares]
        sizes = [int(each) for each in exact]
        by_remainder = sorted(range(len(exact)), key=lambda group: sizes[group] - exact[group])
        for group in by_remainder[: tokens - sum(sizes)]:
            sizes[group] += 1
        return tuple(sizes)

    def draw(
        self, count: int, tokens: int, times: Times, stream: Callable[[str], torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Draw times and groups of images, without waiting for the device.

        Args:
            count: images B.
            tokens: of each, T.
            times: draws the times of one group.
            stream: name → generator at the start of a stream, valid until the next call.

        Returns:
            Times of the groups ``[B, G]`` and the group of each token, int64 ``[B, T]``. Of an image that is
            whole every group has the last one's time.
        """
        last = len(self.shares) - 1
        t = times(count, stream("time")).unsqueeze(1)
        if self.one_time:
            t = t.expand(-1, last + 1)
        else:
            others = [times(count, stream(f"time of group {group}")).unsqueeze(1) for group in range(last)]
            t = torch.cat([*others, t], dim=1)
        generator = stream("groups")
        order = torch.rand(count, tokens, generator=generator, device=generator.device).argsort(dim=1)
        groups, first = torch.zeros_like(order), 0
        for size in self.sizes(tokens)[:-1]:
            first += size
            groups = groups + (order >= first)
        generator = stream("whole")
        whole = torch.rand(count, generator=generator, device=generator.device) < self.whole
        groups = torch.where(whole.unsqueeze(1), last, groups)
        return torch.where(whole.unsqueeze(1), t[:, -1:], t), groups
