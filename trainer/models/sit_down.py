"""SiT↓, the U-shaped SiT of U-REPA (arXiv 2503.18414, table 2), whose middle works on half the grid's side.

None of the authors' code could be had. What the paper leaves open is read as its counts of parameters and
operations leave it, which this build meets to the last printed digit. Down- and up-sampling are those of
U-DiT, as the first author says. Initialisation and names of parameters are ours; no checkpoint is published.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.errors import RepaError
from .base import Backbone
from .capture import NOTHING, BackboneFacts, BlockFacts, Capture, Captured
from .conditioning import Conditioner, LabelConditioner
from .gated_mlp import SwiGlu
from .layers import (
    Block,
    FinalLayer,
    PatchEmbedding,
    TimestepEmbedding,
    initialise_transformer,
    position_table,
    unpatchify,
)
from .rotary import axial_rotation
from .sized import SizedConfig

if TYPE_CHECKING:
    from .token_groups import TokenGroups


@dataclass(frozen=True, kw_only=True)
class SiTDownSize:
    """What makes a size.

    Attributes:
        outer: blocks before the down-sampling, and as many after the up-sampling.
        middle: blocks between the two.
        width: channels of a token, in all of them.
        heads: attention heads.
        mlp_width: hidden channels of the gated MLP.
    """

    outer: int
    middle: int
    width: int
    heads: int
    mlp_width: int


SIT_DOWN_SIZES = {
    # ours, for the demo: as many multiplications as SiT-T
    "T": SiTDownSize(outer=2, middle=3, width=128, heads=2, mlp_width=344),
    # paper, table 2; the MLP's width is 8/3 of the token's, rounded up to a multiple of 256
    "B": SiTDownSize(outer=5, middle=5, width=768, heads=12, mlp_width=2048),
    "L": SiTDownSize(outer=9, middle=14, width=1024, heads=16, mlp_width=2816),
    "XL": SiTDownSize(outer=10, middle=16, width=1152, heads=16, mlp_width=3072),
}
FACTOR = 2
"""Side of the outer grid over that of the middle's."""


@dataclass(frozen=True, kw_only=True)
class SiTDownConfig(SizedConfig):
    """Architecture of a SiT↓.

    Attributes:
        outer: blocks before the down-sampling, and as many after the up-sampling.
        middle: blocks between the two.
        width: channels of a token.
        heads: attention heads.
        mlp_width: hidden channels of the gated MLP.
        qk_norm: LayerNorm of queries and keys per head.
    """

    family = "SiT-down"
    sizes = SIT_DOWN_SIZES
    letters = tuple(SIT_DOWN_SIZES)
    multiple = FACTOR

    outer: int
    middle: int
    width: int
    heads: int
    mlp_width: int
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.input_size % (FACTOR * self.patch_size):
            fitting = self.fitting_patches
            raise RepaError(
                f"SiT-down halves its grid: patch {self.patch_size} does not cut the latent's side "
                f"{self.input_size} into an even number of patches",
                f"choose patch {', '.join(map(str, fitting))}"
                if fitting
                else "take a --model without a stage of half the grid, as SiT",
                field="--model",
            )

    @property
    def middle_grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of the middle blocks."""
        rows, columns = self.grid
        return rows // FACTOR, columns // FACTOR

    @property
    def facts(self) -> BackboneFacts:
        """What methods may know. Grid and patch are the outer blocks'."""
        outer = BlockFacts(width=self.width, heads=self.heads, grid=self.grid)
        middle = BlockFacts(width=self.width, heads=self.heads, grid=self.middle_grid)
        blocks = (outer,) * self.outer + (middle,) * self.middle + (outer,) * self.outer
        return BackboneFacts(
            channels=self.in_channels,
            depth=len(blocks),
            width=self.width,
            heads=self.heads,
            grid=self.grid,
            patch_size=self.patch_size,
            size_name=self.size_name,
            blocks=blocks,
            siblings=self.siblings,
        )


class Down(nn.Conv2d):
    """A 3×3 convolution to a quarter of the channels, then each 2×2 tokens as one.

    Args:
        width: channels of a token.
        to: channels of a token afterwards, a multiple of 4.
    """

    def __init__(self, width: int, to: int) -> None:
        super().__init__(width, to // FACTOR**2, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, D, rows, columns]`` to ``[B, D', rows / 2, columns / 2]``."""
        return F.pixel_unshuffle(super().forward(x), FACTOR)


class Up(nn.Conv2d):
    """A 3×3 convolution to four times the channels, then each token as 2×2.

    Args:
        width: channels of a token.
        to: channels of a token afterwards.
    """

    def __init__(self, width: int, to: int) -> None:
        super().__init__(width, to * FACTOR**2, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, D, rows, columns]`` to ``[B, D', 2 · rows, 2 · columns]``."""
        return F.pixel_shuffle(super().forward(x), FACTOR)


class JoiningBlock(Block):
    """A block that begins with a linear map of its tokens and those of an earlier block, side by side."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool, mlp: Any) -> None:
        super().__init__(width, heads, qk_norm=qk_norm, mlp=mlp)
        self.skip_linear = nn.Linear(2 * width, width)

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        rotation: Tensor | None = None,
        groups: TokenGroups | None = None,
        mask: Tensor | None = None,
        *,
        skip: Tensor | None = None,
        look: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute one block, of the tokens and those of the earlier block, ``skip`` ``[B, T, D]``.

        Raises:
            ValueError: those of the earlier block are missing.
        """
        if skip is None:
            raise ValueError("a block that joins wants the tokens of an earlier one")
        joined = self.skip_linear(torch.cat([x, skip], dim=-1))
        return super().forward(joined, embedding, rotation, groups, mask, look=look)


class SiTDown(Backbone):
    """The U-shaped transformer from noisy latent, time and condition to prediction, plus activations.

    The first and last `outer` blocks work on the latent's grid, the `middle` ones on half its side. A block
    after the up-sampling also takes the output of one before the down-sampling, the last one first. Outer
    blocks and final layer have one embedding of time and condition, the middle blocks another; both see the
    same condition, so that a label that is dropped is dropped for all.

    State dict keys are those of SiT, and ``blocks.N.skip_linear``, ``blocks.N.mlp.{fc1_g,fc1_x,fc2}``,
    ``mid_t_embedder``, ``mid_y_embedder``, ``down``, ``up``. Parameters are drawn from torch's global
    generator.

    Args:
        config: architecture.
        conditioner: embeds the condition; a copy of it does for the middle blocks. Class labels by default.
    """

    config: SiTDownConfig
    rotation: Tensor
    mid_rotation: Tensor

    def __init__(self, config: SiTDownConfig, conditioner: Conditioner | None = None) -> None:
        super().__init__()
        self.config = config
        self.facts = config.facts
        width = config.width
        self.x_embedder = PatchEmbedding(config.in_channels, config.patch_size, width)
        self.t_embedder, self.mid_t_embedder = TimestepEmbedding(width), TimestepEmbedding(width)
        self.y_embedder = conditioner or LabelConditioner(config.num_classes, width)
        self.mid_y_embedder = (
            copy.deepcopy(conditioner) if conditioner else LabelConditioner(config.num_classes, width)
        )
        table = position_table(width, config.grid).to(torch.get_default_dtype())
        self.pos_embed = nn.Parameter(table.unsqueeze(0), requires_grad=False)
        self.add_tables()
        kinds = [Block] * (config.outer + config.middle) + [JoiningBlock] * config.outer
        mlp = partial(SwiGlu, hidden=config.mlp_width)
        self.blocks = nn.ModuleList(
            kind(width, config.heads, qk_norm=config.qk_norm, mlp=mlp) for kind in kinds
        )
        self.down, self.up = Down(width, width), Up(width, width)
        self.final_layer = FinalLayer(width, config.patch_size, config.in_channels)
        self._initialise()

    def add_tables(self) -> None:
        """Register the rotations of the tokens of both grids."""
        config = self.config
        for name, grid in (("rotation", config.grid), ("mid_rotation", config.middle_grid)):
            turns = axial_rotation(config.width // config.heads, grid).to(torch.get_default_dtype())
            self.register_buffer(name, turns, persistent=False)

    def _initialise(self) -> None:
        """Draw the weights as SiT's, and Xavier uniform ones of down- and up-sampling.

        Zeros there would hide the middle blocks from those after them at first.
        """
        initialise_transformer(self, conditioners=("y_embedder", "mid_y_embedder"))
        for convolution in (self.down, self.up):
            nn.init.xavier_uniform_(convolution.weight)

    def left_out(self, stop_after: int) -> tuple[str, ...]:
        """Name later blocks and final layer, and what leads into the stages that are not reached."""
        config, later = self.config, super().left_out(stop_after)
        if stop_after <= config.outer:
            later = (*later, "mid_t_embedder.", "mid_y_embedder.", "down.")
        return (*later, "up.") if stop_after <= config.outer + config.middle else later

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, capture: Capture = NOTHING) -> Captured:
        """Predict what the objective trains, the velocity in the paper.

        Args:
            x: noisy latent ``[B, C, h, w]``.
            t: time in [0, 1], ``[B]``; data at 0, noise at 1.
            condition: what the conditioner embeds; labels int64 ``[B]`` by default.
            capture: activations to return.

        Returns:
            The prediction ``[B, C, h, w]`` (None after an early stop) and the activations.

        Raises:
            ValueError: the capture names a block that does not run.
        """
        config = self.config
        last = capture.last_block(self.facts.depth)
        captured = Captured(prediction=None)
        tokens = self.x_embedder(x) + self.pos_embed
        outer = self.t_embedder(t) + self.y_embedder(condition), self.rotation
        middle = self.mid_t_embedder(t) + self.mid_y_embedder(condition), self.mid_rotation
        skips: list[Tensor] = []
        for number in range(1, last + 1):
            if number == config.outer + 1:
                tokens = _on_grid(self.down, tokens, config.grid)
            if number == config.outer + config.middle + 1:
                tokens = _on_grid(self.up, tokens, config.middle_grid)
            joins = number > config.outer + config.middle
            inside = config.outer < number and not joins
            skip = {"skip": skips.pop()} if joins else {}
            tokens, looked = self.run_block(
                number,
                tokens,
                *(middle if inside else outer),
                look=number in capture.attention,
                **skip,
            )
            if number <= config.outer:
                skips.append(tokens)
            if number in capture.hidden:
                captured.hidden[number] = tokens
                captured.grids[number] = self.facts.grid_of(number)
            if looked:
                captured.queries[number], captured.keys[number] = looked
        if capture.stop_after is None:
            patches = self.final_layer(tokens, outer[0])
            captured.prediction = unpatchify(patches, config.grid, config.patch_size)
        return captured


def _on_grid(convolution: Down | Up, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Apply a convolution to tokens ``[B, T, D]`` that lie on a grid."""
    image = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    output: Tensor = convolution(image)
    return output.flatten(2).transpose(1, 2).contiguous()
