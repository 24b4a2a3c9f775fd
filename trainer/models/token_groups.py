"""Groups of an image's tokens, each at a time of its own (Self-Flow's dual-timestep scheduling)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenGroups:
    """The group of each token, and whether groups see one another.

    Attributes:
        of_token: number of the group, int64 ``[B, T]``, row-major over the backbone's grid.
        separate: whether a token attends to the tokens of its own group alone.
    """

    of_token: Tensor
    separate: bool

    def spread(self, values: Tensor) -> Tensor:
        """Give each token its group's values, ``[B, G, D]`` → ``[B, T, D]``."""
        # a choice per group and no gather: a compiler makes it part of the operation that takes it, and its
        # gradient is a sum, where that of gather adds on a GPU in an order that no run repeats
        found = values[:, :1].expand(-1, self.of_token.shape[1], -1)
        for group in range(1, values.shape[1]):
            belongs = (self.of_token == group).unsqueeze(-1)
            found = torch.where(belongs, values[:, group : group + 1], found)
        return found

    def on_latent(self, times: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
        """Give each pixel of the latent the time of its patch.

        Args:
            times: of the groups ``[B, G]``.
            grid: rows and columns of the tokens.
            patch_size: side of a patch in pixels.

        Returns:
            ``[B, 1, h, w]``.
        """
        patches = self.spread(times.unsqueeze(-1)).reshape(len(times), 1, *grid)
        return patches.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)

    def mask(self) -> Tensor | None:
        """Return which token may attend to which, bool ``[B, 1, T, T]``, or None if each may to all."""
        # Given to fused attention, which makes no scores of it. Processor time of forward and backward on one
        # core, float32, 12 heads of 64, 8 × 256 tokens: 83 ms, as without a mask; 98 with queries, keys and
        # values sorted by group and one call for each; 106 with scores written out. The mask has 65 kB an
        # image, the scores 3.1 MB. At 2 × 1,024 tokens it is 358, 323, 231 and 776 ms: there sorting is
        # faster, but it wants groups of one size in all images, which images of one group do not have.
        if not self.separate:
            return None
        return (self.of_token.unsqueeze(1) == self.of_token.unsqueeze(2)).unsqueeze(1)
