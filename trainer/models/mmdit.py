"""MM-DiT, the two-stream transformer of Stable Diffusion 3 (arXiv 2403.03206), as REPA trains it on captions.

REPA (arXiv 2410.06940, appendix K) takes 32 channels a head and a head a block: depth 24, width 768.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.errors import RepaError
from .base import Backbone
from .capture import NOTHING, BackboneFacts, Capture, Captured
from .layers import (
    NORM_EPS,
    FinalLayer,
    Mlp,
    PatchEmbedding,
    TimestepEmbedding,
    initialise_transformer,
    modulate,
    position_table,
    split_heads,
    unpatchify,
)
from .sized import SizedConfig

if TYPE_CHECKING:
    from .conditioning import Conditioner

HEAD_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class MMDiTSize:
    """Joint blocks, width (channels of a token, of image and text) and heads of a size."""

    depth: int
    width: int
    heads: int


# 6 is ours, for the demo; not a published size
MMDIT_SIZES = {str(depth): MMDiTSize(depth=depth, width=HEAD_WIDTH * depth, heads=depth) for depth in (6, 24)}


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig(SizedConfig):
    """Architecture of an MM-DiT, named by its depth.

    Attributes:
        depth: number of joint blocks.
        width: channels of a token, of the image and of the text.
        heads: attention heads.
        qk_norm: LayerNorm of queries and keys per head, of each stream its own.
        adaln_zero: draw weights as a SiT's, with gates and output at zero. Else every layer is drawn as
            PyTorch does, as in REPA's code for captions; the published numbers are of such runs.
    """

    family = "MMDiT"
    sizes = MMDIT_SIZES
    letters = tuple(MMDIT_SIZES)
    takes_sequences = True

    depth: int
    width: int
    heads: int
    qk_norm: bool = False
    adaln_zero: bool = False

    def __post_init__(self) -> None:
        if self.input_size % self.patch_size:
            raise RepaError(
                f"patch {self.patch_size} does not divide the latent's side {self.input_size}",
                f"choose patch {', '.join(map(str, self.fitting_patches))}",
                field="--model",
            )

    @property
    def facts(self) -> BackboneFacts:
        """What methods may know. Grid and tokens are the image stream's."""
        return BackboneFacts(
            channels=self.in_channels,
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            grid=self.grid,
            patch_size=self.patch_size,
            # no size of SiT, whose presets name other blocks
            size_name=f"MMDiT-{self.size_name}" if self.size_name else None,
            siblings=self.siblings,
        )


class StreamAttention(nn.Module):
    """The linear maps of one stream around the attention that both share.

    Args:
        width: D, channels of a token.
        heads: H.
        qk_norm: LayerNorm of queries and keys.
        answers: whether the stream takes its part of the output; else it has no map for it.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, answers: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width) if answers else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[B, H, T, D / H]`` of tokens ``[B, T, D]``."""
        queries, keys, values = split_heads(self.qkv(x), self.heads)
        return self.q_norm(queries), self.k_norm(keys), values


class Stream(nn.Module):
    """One of the two streams of a joint block, with weights of its own and adaLN of the time alone.

    Its six chunks are shift, scale and gate of attention, then of the MLP. The text of the last block is only
    looked at: it has the first two, and neither output nor MLP.

    Args:
        width: D, channels of a token.
        heads: H.
        qk_norm: LayerNorm of queries and keys.
        answers: whether its tokens change.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, answers: bool) -> None:
        super().__init__()
        self.answers = answers
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=NORM_EPS)
        self.attn = StreamAttention(width, heads, qk_norm=qk_norm, answers=answers)
        if answers:
            self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=NORM_EPS)
            self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if answers else 2) * width))

    def chunks(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """Return shifts, scales and gates of an embedding ``[B, D]``, six or two times ``[B, D]``."""
        return tuple(self.adaLN_modulation(embedding).chunk(6 if self.answers else 2, dim=1))

    def ask(self, x: Tensor, chunks: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the tokens ``[B, T, D]`` bring to the attention, ``[B, H, T, D / H]`` each."""
        brought: tuple[Tensor, Tensor, Tensor] = self.attn(modulate(self.norm1(x), *chunks[:2]))
        return brought

    def answer(self, x: Tensor, attended: Tensor, chunks: tuple[Tensor, ...]) -> Tensor:
        """Return the tokens ``[B, T, D]`` after the block, given the stream's part of the attention."""
        _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunks
        x = x + gate_msa.unsqueeze(1) * self.attn.proj(attended)
        changed: Tensor = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return changed


class JointBlock(nn.Module):
    """A block of both streams, whose attention is over text and image together, the text first.

    Args:
        width: D, channels of a token.
        heads: H.
        qk_norm: LayerNorm of queries and keys.
        last: whether it is the last one, whose text is not needed any more.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, last: bool) -> None:
        super().__init__()
        self.context_block = Stream(width, heads, qk_norm=qk_norm, answers=not last)
        self.x_block = Stream(width, heads, qk_norm=qk_norm, answers=True)

    def forward(
        self, x: Tensor, text: Tensor, embedding: Tensor, *, look: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Compute one block.

        Args:
            x: tokens of the image ``[B, T, D]``.
            text: tokens of the text ``[B, S, D]``.
            embedding: of the time, ``[B, D]``.
            look: whether the image's queries and keys are wanted.

        Returns:
            Tokens of the image ``[B, T, D]`` and of the text ``[B, S, D]``; the image's queries and keys
            ``[B, H, T, D / H]`` if they are wanted, else nothing.
        """
        of_text, of_image = self.context_block.chunks(embedding), self.x_block.chunks(embedding)
        asked_text, asked_image = self.context_block.ask(text, of_text), self.x_block.ask(x, of_image)
        queries, keys, values = (torch.cat(pair, dim=2) for pair in zip(asked_text, asked_image, strict=True))
        # norms of queries and keys give float32 under autocast, the values are half precision
        attended = F.scaled_dot_product_attention(queries.to(values.dtype), keys.to(values.dtype), values)
        joint = attended.transpose(1, 2).flatten(2)
        for_text, for_image = joint[:, : text.shape[1]], joint[:, text.shape[1] :]
        if self.context_block.answers:
            text = self.context_block.answer(text, for_text, of_text)
        return self.x_block.answer(x, for_image, of_image), text, asked_image[:2] if look else ()


class MMDiT(Backbone):
    """The two-stream transformer from noisy latent, time and text to prediction, plus activations.

    Hidden states, queries and keys are the image stream's: rows of such an attention are no rows of the
    network's, which also looks at the text (as HASTE compares them). Text has no positions, and all of its
    tokens are attended to, also those that fill it up to its length.

    State dict keys are those of REPA's MM-DiT but ``y_embedder.proj`` for ``context_embedder`` and ``blocks``
    for ``joint_blocks``. Parameters are drawn from torch's global generator.

    Args:
        config: architecture.
        conditioner: embeds text as a sequence ``[B, S, D]``.

    Raises:
        ValueError: the condition is no sequence.
    """

    config: MMDiTConfig

    def __init__(self, config: MMDiTConfig, conditioner: Conditioner | None = None) -> None:
        super().__init__()
        if conditioner is None or not conditioner.sequence:
            raise ValueError("an MM-DiT is conditioned on a sequence of tokens")
        self.config = config
        self.facts = config.facts
        width = config.width
        self.x_embedder = PatchEmbedding(config.in_channels, config.patch_size, width)
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = conditioner
        table = position_table(width, self.facts.grid).to(torch.get_default_dtype())
        self.pos_embed = nn.Parameter(table.unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(
            JointBlock(width, config.heads, qk_norm=config.qk_norm, last=number == config.depth)
            for number in range(1, config.depth + 1)
        )
        self.final_layer = FinalLayer(width, config.patch_size, config.in_channels)
        if config.adaln_zero:
            initialise_transformer(self, conditioners=("y_embedder",))

    def left_out(self, stop_after: int) -> tuple[str, ...]:
        """Name later blocks and final layer, and what makes of the last block's text what none reads."""
        text = f"blocks.{stop_after - 1}.context_block"
        return (*super().left_out(stop_after), f"{text}.attn.proj.", f"{text}.attn.q_norm.", f"{text}.mlp.")

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, capture: Capture = NOTHING) -> Captured:
        """Predict what the objective trains, the velocity in REPA.

        Args:
            x: noisy latent ``[B, C, h, w]``.
            t: time in [0, 1], ``[B]``; data at 0, noise at 1.
            condition: what the conditioner embeds, states of a text encoder ``[B, S, E]``.
            capture: activations to return.

        Returns:
            The prediction ``[B, C, h, w]`` (None after an early stop) and the activations.

        Raises:
            ValueError: the capture names a block that does not run.
        """
        last = capture.last_block(self.config.depth)
        captured = Captured(prediction=None)
        tokens = self.x_embedder(x) + self.pos_embed
        text = self.y_embedder(condition)
        embedding = self.t_embedder(t)
        for number in range(1, last + 1):
            look = number in capture.attention
            tokens, text, looked = self.run_block(number, tokens, text, embedding, look=look)
            if number in capture.hidden:
                captured.hidden[number] = tokens
                captured.grids[number] = self.facts.grid
            if looked:
                captured.queries[number], captured.keys[number] = looked
        if capture.stop_after is None:
            patches = self.final_layer(tokens, embedding)
            captured.prediction = unpatchify(patches, self.facts.grid, self.config.patch_size)
        return captured
