"""What a forward pass is asked to return besides the prediction, and what it returns.

Activations are asked for by explicit argument, never by hooks: a hook added after the first `torch.compile`
is silently never called. A `Capture` is frozen and hashable, so each distinct one is one compiled graph.
Blocks are counted from 1: hidden state k is the output of block k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """What a method may know of one block.

    Attributes:
        width: channels of a token of its output.
        heads: its attention heads; 0 without attention.
        grid: rows and columns of the tokens of its output.
    """

    width: int
    heads: int
    grid: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """What a method may know of the backbone before it exists.

    Attributes:
        depth: number of blocks.
        width: channels of a token, of most blocks.
        heads: attention heads of a block, of most blocks; 0 without attention.
        grid: rows and columns of the tokens, of most blocks.
        patch_size: side in latent pixels of the patch that one token of that grid stands for.
        size_name: letter of the published size (``"B"``), None if it is none of them.
        family: what the names of such backbones begin with; methods may have presets of a family.
        blocks: every block's facts where they differ, as in a U-Net; empty where all blocks are alike.
        siblings: names of models of this size on this latent, each after the grid of its tokens.
        token_times: whether tokens may have times of their own, in groups (see `Backbone`).
        resolution: side in pixels of the images that it is trained on, as their cache records it; None where
            that is not known.
        channels: of the latent; None where that is not known.
        stepped_time: whether the network's time is one of the thousand steps of `timesteps`, not continuous.
    """

    depth: int
    width: int
    heads: int
    grid: tuple[int, int]
    patch_size: int
    size_name: str | None = None
    family: str = ""
    blocks: tuple[BlockFacts, ...] = ()
    siblings: tuple[tuple[tuple[int, int], str], ...] = ()
    token_times: bool = False
    resolution: int | None = None
    stepped_time: bool = False
    channels: int | None = None

    def has_block(self, block: int) -> bool:
        """Return whether the block, counted from 1, exists."""
        return 1 <= block <= self.depth

    def width_of(self, block: int) -> int:
        """Return the channels of the hidden state after a block.

        Raises:
            ValueError: there is no such block.
        """
        return self._block(block).width

    def heads_of(self, block: int) -> int:
        """Return the attention heads of a block, 0 without attention.

        Raises:
            ValueError: there is no such block.
        """
        return self._block(block).heads

    def grid_of(self, block: int) -> tuple[int, int]:
        """Return rows and columns of the tokens after a block.

        Raises:
            ValueError: there is no such block.
        """
        return self._block(block).grid

    def _block(self, block: int) -> BlockFacts:
        self._check(block)
        if self.blocks:
            return self.blocks[block - 1]
        return BlockFacts(width=self.width, heads=self.heads, grid=self.grid)

    def _check(self, block: int) -> None:
        if not self.has_block(block):
            raise ValueError(f"block {block} does not exist; the backbone has blocks 1 to {self.depth}")


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Activations to return.

    Attributes:
        hidden: blocks whose output tokens to return.
        attention: blocks whose queries and keys to return.
        stop_after: last block to run; the prediction is then not made. None runs all.
    """

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    stop_after: int | None = None

    def last_block(self, depth: int) -> int:
        """Last block that must run in a backbone of that depth.

        Raises:
            ValueError: a block is asked for that does not exist or lies after ``stop_after``.
        """
        last = depth if self.stop_after is None else self.stop_after
        if not 1 <= last <= depth:
            raise ValueError(f"stop_after {last} is outside blocks 1 to {depth}")
        for block in (*self.hidden, *self.attention):
            if not 1 <= block <= last:
                raise ValueError(f"activations of block {block} were asked for; blocks 1 to {last} run")
        return last


NOTHING = Capture()
"""Only the prediction."""


@dataclass(kw_only=True)
class Captured:
    """What a forward pass returned.

    Attributes:
        prediction: what the objective trains ``[B, C, h, w]``, with the config's `prediction_channels`; None
            after an early stop.
        tokens: the same of each vector that is denoised beside the latent ``[B, D]``.
        hidden: block → its output tokens ``[B, T, D]``, row-major over the grid.
        leading: block → the tokens before those of the grid ``[B, n, D]``, for every block in `hidden`
            where there are any.
        grids: block → rows and columns of its tokens, for every block in `hidden`.
        queries: block → ``[B, H, T, D / H]`` of the grid's tokens, as the network compares them: after
            QK-norm and rotary positions if any, before the scale.
        keys: block → the same of the keys.
    """

    prediction: Tensor | None
    tokens: tuple[Tensor, ...] = ()
    hidden: dict[int, Tensor] = field(default_factory=dict)
    leading: dict[int, Tensor] = field(default_factory=dict)
    grids: dict[int, tuple[int, int]] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
