"""SiT, the scalable interpolant transformer (arXiv 2401.08740), as REPA (arXiv 2410.06940) trains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...data.errors import RepaError
from .base import Backbone
from .capture import NOTHING, BackboneFacts, Capture, Captured
from .conditioning import Conditioner, LabelConditioner
from .layers import (
    NORM_EPS,
    Block,
    FinalLayer,
    Mlp,
    PatchEmbedding,
    TimestepEmbedding,
    gated_mlp,
    initialise_linear,
    initialise_transformer,
    position_table,
    unpatchify,
)
from .rotary import axial_rotation
from .sized import SizedConfig

if TYPE_CHECKING:
    from .token_groups import TokenGroups


@dataclass(frozen=True, kw_only=True)
class SiTSize:
    """Depth (blocks), width (channels of a token) and heads of a size."""

    depth: int
    width: int
    heads: int


SIT_SIZES = {
    # ours, for the demo; not a published size
    "T": SiTSize(depth=6, width=128, heads=2),
    # DiT, arXiv 2212.09748, table 1
    "S": SiTSize(depth=12, width=384, heads=6),
    "B": SiTSize(depth=12, width=768, heads=12),
    "L": SiTSize(depth=24, width=1024, heads=16),
    "XL": SiTSize(depth=28, width=1152, heads=16),
}


@dataclass(frozen=True, kw_only=True)
class SiTConfig(SizedConfig):
    """Architecture of a SiT.

    Attributes:
        depth: number of blocks.
        width: channels of a token.
        heads: attention heads.
        qk_norm: norm of queries and keys per head.
        rope: rotary positions of queries and keys, beside the fixed table; each half of a head's pairs of
            channels turns by row or by column, as in LightningDiT, GMem and ERW.
        rms_norm: RMSNorm with gain in place of each LayerNorm.
        swiglu: gated MLP of int(2/3 · 4 · width) channels in place of the one with GELU.
    """

    family = "SiT"
    sizes = SIT_SIZES
    letters = tuple(SIT_SIZES)
    most_tokens = 1

    depth: int
    width: int
    heads: int
    qk_norm: bool = False
    rope: bool = False
    rms_norm: bool = False
    swiglu: bool = False

    def __post_init__(self) -> None:
        if self.input_size % self.patch_size:
            raise RepaError(
                f"patch {self.patch_size} does not divide the latent's side {self.input_size}",
                f"choose patch {', '.join(map(str, self.fitting_patches))}",
                field="--model",
            )

    @property
    def facts(self) -> BackboneFacts:
        """What methods may know."""
        return BackboneFacts(
            channels=self.in_channels,
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            grid=self.grid,
            patch_size=self.patch_size,
            size_name=self.size_name,
            family=self.family,
            siblings=self.siblings,
            token_times=True,
        )


class SiT(Backbone):
    """The transformer from noisy latent, time and condition to prediction, plus the activations asked for.

    State dict keys are those of SiT and REPA, so published checkpoints load strictly. Parameters are drawn
    from torch's global generator.

    Args:
        config: architecture.
        conditioner: embeds the condition; class labels by default.
    """

    config: SiTConfig
    rotation: Tensor | None

    def __init__(self, config: SiTConfig, conditioner: Conditioner | None = None) -> None:
        super().__init__()
        self.config = config
        self.facts = config.facts
        width = config.width
        self.x_embedder = PatchEmbedding(config.in_channels, config.patch_size, width)
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = conditioner or LabelConditioner(config.num_classes, width)
        table = position_table(width, self.facts.grid).to(torch.get_default_dtype())
        self.pos_embed = nn.Parameter(table.unsqueeze(0), requires_grad=False)
        self.add_tables()
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.heads,
                qk_norm=config.qk_norm,
                rms_norm=config.rms_norm,
                mlp=gated_mlp if config.swiglu else Mlp,
            )
            for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(
            width, config.patch_size, config.prediction_channels, rms_norm=config.rms_norm
        )
        initialise_transformer(self, conditioners=("y_embedder",))
        if config.token_widths:
            self._add_token(*config.token_widths)

    def add_tables(self) -> None:
        """Register the rotation of the tokens, None without rotary positions.

        A token before those of the grid has no place on it, and is not turned.
        """
        config, turns = self.config, None
        if config.rope:
            head, ahead = config.width // config.heads, len(config.token_widths)
            turns = axial_rotation(head, self.facts.grid, pairs="halves", ahead=ahead)
            turns = turns.to(torch.get_default_dtype())
        self.register_buffer("rotation", turns, persistent=False)

    def _add_token(self, channels: int) -> None:
        """Add what reads and predicts a vector as one more token, before those of the latent (REG).

        Its row of the position table is zero. It comes after all else is drawn, so that the weights it shares
        with a network without it are the same.

        Args:
            channels: of the vector.
        """
        width = self.config.width
        self.cls_projectors2 = nn.Linear(channels, width)
        self.wg_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.final_layer.linear_cls = nn.Linear(width, channels)
        initialise_linear(self.cls_projectors2)
        nn.init.zeros_(self.final_layer.linear_cls.weight)
        nn.init.zeros_(self.final_layer.linear_cls.bias)
        table = nn.functional.pad(self.pos_embed.detach(), (0, 0, 1, 0))
        self.pos_embed = nn.Parameter(table, requires_grad=False)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor,
        capture: Capture = NOTHING,
        beside: tuple[Tensor, ...] = (),
        *,
        groups: TokenGroups | None = None,
    ) -> Captured:
        """Predict what the objective trains, the velocity in the published models.

        Args:
            x: noisy latent ``[B, C, h, w]``.
            t: time in [0, 1], ``[B]``, or of each group ``[B, G]``; data at 0, noise at 1.
            condition: what the conditioner embeds; labels int64 ``[B]`` by default.
            capture: activations to return.
            beside: noisy vectors ``[B, D]`` of the config's `token_widths`.
            groups: of the tokens, where an image has several times. Vectors beside the latent have none.

        Returns:
            The predictions ``[B, C, h, w]`` and ``[B, D]`` (none after an early stop) and the activations.

        Raises:
            ValueError: the capture names a block that does not run, or there are other vectors than in the
                config.
        """
        last = capture.last_block(self.config.depth)
        captured, ahead = Captured(prediction=None), len(beside)
        tokens = self._embed(x, beside) + self.pos_embed
        times, label = self.t_embedder(t), self.y_embedder(condition)
        embedding = times + (label if groups is None else label.unsqueeze(1))
        mask = None if groups is None else groups.mask()
        for number in range(1, last + 1):
            look = number in capture.attention
            tokens, looked = self.run_block(
                number, tokens, embedding, self.rotation, groups=groups, mask=mask, look=look
            )
            if number in capture.hidden:
                captured.hidden[number] = tokens[:, ahead:]
                captured.grids[number] = self.facts.grid
                if ahead:
                    captured.leading[number] = tokens[:, :ahead]
            if looked:
                captured.queries[number], captured.keys[number] = (each[:, :, ahead:] for each in looked)
        if capture.stop_after is None:
            final = self.final_layer.modulated(tokens, embedding, groups)
            patches = self.final_layer.linear(final[:, ahead:])
            captured.prediction = unpatchify(patches, self.facts.grid, self.config.patch_size)
            captured.tokens = tuple(self.final_layer.linear_cls(final[:, at]) for at in range(ahead))
        return captured

    def _embed(self, x: Tensor, beside: tuple[Tensor, ...]) -> Tensor:
        """Embed the latent's patches, after the vectors where there are some, ``[B, T, D]``."""
        widths = tuple(each.shape[1] for each in beside)
        if widths != self.config.token_widths:
            raise ValueError(
                f"vectors of {widths} channels came, the network takes {self.config.token_widths}"
            )
        leading = [self.wg_norm(self.cls_projectors2(each)).unsqueeze(1) for each in beside]
        patches: Tensor = self.x_embedder(x)
        return torch.cat([*leading, patches], dim=1) if leading else patches
