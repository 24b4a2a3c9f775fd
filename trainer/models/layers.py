"""The layers of a SiT (arXiv 2401.08740, after DiT, arXiv 2212.09748), under the published parameter names.

Shapes: B batch, T tokens, D width, H heads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import EMBEDDING_STD
from .gated_mlp import PackedSwiGlu, two_thirds
from .rotary import rotate

if TYPE_CHECKING:
    from collections.abc import Callable

    from .token_groups import TokenGroups

FREQUENCIES = 256
MAX_PERIOD = 10_000.0
MLP_RATIO = 4
NORM_EPS = 1e-6
NEAR_TIES = (12, 106)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute ``x · (1 + scale) + shift`` with x ``[B, T, D]``, shift and scale ``[B, D]`` or as x."""
    return x * (1 + _per_token(scale)) + _per_token(shift)


def _per_token(values: Tensor, groups: TokenGroups | None = None) -> Tensor:
    """Return what multiplies tokens, ``[B, 1, D]`` of an image's values, ``[B, T, D]`` of its groups'."""
    if groups is not None:
        return groups.spread(values)
    return values.unsqueeze(1) if values.ndim == 2 else values


def position_table(width: int, grid: tuple[int, int]) -> Tensor:
    """Compute the fixed 2-D sine-cosine table of DiT.

    The first half of the channels encodes the column (w comes first in the mesh), the second half the row;
    in each half the sines come before the cosines, with frequencies 10000^(−i / (D/4)).

    Args:
        width: D, a multiple of 4.
        grid: rows and columns.

    Returns:
        float64 ``[rows · columns, D]``, row-major.

    Raises:
        ValueError: the width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} is no multiple of 4, as the sine-cosine position table needs")
    frequencies = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(count, dtype=torch.float64) for count in grid)

    def encode(positions: Tensor) -> Tensor:
        angles = positions[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    by_column = encode(columns).repeat(grid[0], 1)
    by_row = encode(rows).repeat_interleave(grid[1], dim=0)
    return torch.cat([by_column, by_row], dim=1)


def time_frequencies(device: torch.device) -> Tensor:
    """Compute the frequencies of the time embedding, 10000^(−i/128) for i < 128, alike on every machine.

    The published code takes the float32 `exp` of float32 exponents, which one processor rounds up and another
    down; a float64 velocity moves by 1e-7. Here the exponential is taken in float64 and rounded once. Two
    of the 128 values lie so near the middle of two float32 numbers (0.5207 and 0.5179 units away) that the
    reference run, whose numbers the tests hold, had the neighbour above: so has this table.

    Args:
        device: where to put them.

    Returns:
        float32 ``[128]``.
    """
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=device)
    exponents = -math.log(MAX_PERIOD) * steps / half
    frequencies = exponents.double().exp().float()
    raised = (steps == NEAR_TIES[0]) | (steps == NEAR_TIES[1])
    return torch.where(raised, torch.nextafter(frequencies, torch.ones_like(frequencies)), frequencies)


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, each mapped linearly to one token, ``[B, C, h, w]`` → ``[B, T, D]``."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``[B, T, D]``, row-major."""
        tokens: Tensor = self.proj(x)
        # the sums of a residual stream take the strides of their first term: all blocks would copy and stride
        return tokens.flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedding(nn.Module):
    """Time in [0, 1], unscaled → 256 sinusoids (cosines, then sines) → Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times ``[B]`` as ``[B, D]``, or times of groups ``[B, G]`` as ``[B, G, D]``."""
        # float32 even for float64 times: the published models have it so
        angles = t.float().unsqueeze(-1) * time_frequencies(t.device)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedding: Tensor = self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))
        return embedding


class RmsNorm(nn.RMSNorm):
    """x / √(mean(x²) + 1e-6) · gain over the channels (arXiv 1910.07467), in float32 at least."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[…, D]`` to ``[…, D]``, in the wider dtype of input and gain."""
        # under autocast tokens may be narrower than the gain, and torch then leaves its fused kernel
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))


def token_norm(width: int, *, rms: bool) -> nn.Module:
    """Return what normalises tokens before adaLN, a LayerNorm without gain or an RMSNorm with one.

    Args:
        width: D, channels of a token.
        rms: whether it is RMSNorm.
    """
    if rms:
        return RmsNorm(width)
    return nn.LayerNorm(width, elementwise_affine=False, eps=NORM_EPS)


class Attention(nn.Module):
    """Multi-head self-attention with optional norm of queries and keys.

    Args:
        width: D, channels of a token.
        heads: H.
        qk_norm: normalise queries and keys of each head.
        rms_norm: by RMSNorm instead of LayerNorm.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, rms_norm: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (_head_norm(width // heads, qk_norm, rms_norm) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend over the tokens.

        Args:
            x: tokens ``[B, T, D]``.
            rotation: rotary positions ``[2, T, D / H / 2]``, of `axial_rotation`; None for none.
            mask: which token may attend to which, bool ``[B, 1, T, T]``; None for all.

        Returns:
            Output ``[B, T, D]``; queries and keys ``[B, H, T, D / H]``, after norms and rotation, before the
            scale.
        """
        B, T, D = x.shape
        queries, keys, values = split_heads(self.qkv(x), self.heads)
        queries, keys = self.q_norm(queries), self.k_norm(keys)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        # norms and rotation of queries and keys give float32 under autocast, the values are half precision
        attended = F.scaled_dot_product_attention(
            queries.to(values.dtype), keys.to(values.dtype), values, attn_mask=mask
        )
        output: Tensor = self.proj(attended.transpose(1, 2).reshape(B, T, D))
        return output, queries, keys


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values ``[B, H, T, D / H]`` of one linear map's output ``[B, T, 3 · D]``."""
    B, T, D = qkv.shape
    # unbound before it is transposed: the backward pass then writes their gradients once, where they belong
    queries, keys, values = qkv.view(B, T, 3, heads, D // (3 * heads)).unbind(2)
    return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def _head_norm(channels: int, normalise: bool, rms: bool) -> nn.Module:
    if not normalise:
        return nn.Identity()
    return RmsNorm(channels) if rms else nn.LayerNorm(channels)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T, D]``."""
        output: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return output


def gated_mlp(width: int) -> PackedSwiGlu:
    """Return a SwiGLU of as many weights as `Mlp`."""
    return PackedSwiGlu(width, two_thirds(width, MLP_RATIO))


class Block(nn.Module):
    """Transformer block with adaLN-zero.

    Its six chunks are shift, scale and gate of attention, then of the MLP.

    Args:
        width: D, channels of a token.
        heads: H.
        qk_norm: norm of queries and keys.
        rms_norm: RMSNorm with gain instead of LayerNorm, of tokens and of queries and keys.
        mlp: makes the MLP, given the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool,
        rms_norm: bool = False,
        mlp: Callable[[int], nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = token_norm(width, rms=rms_norm)
        self.attn = Attention(width, heads, qk_norm=qk_norm, rms_norm=rms_norm)
        self.norm2 = token_norm(width, rms=rms_norm)
        self.mlp = mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        rotation: Tensor | None = None,
        groups: TokenGroups | None = None,
        mask: Tensor | None = None,
        *,
        look: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute one block.

        Args:
            x: tokens ``[B, T, D]``.
            embedding: of time and condition, ``[B, D]``, or of each group ``[B, G, D]``.
            rotation: rotary positions ``[2, T, D / H / 2]``; None for none.
            groups: of the tokens; None where an image has one embedding.
            mask: of `TokenGroups.mask`.
            look: whether queries and keys are wanted.

        Returns:
            Tokens ``[B, T, D]``; queries and keys ``[B, H, T, D / H]`` if they are wanted, else nothing.
        """
        # adaLN of G embeddings, and only then one for each token
        chunks = (_per_token(each, groups) for each in self.adaLN_modulation(embedding).chunk(6, dim=-1))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunks
        attended, queries, keys = self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rotation, mask)
        x = x + gate_msa * attended
        x = x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        # a block that is compiled by itself would have to write out what it returns, and its gradient
        return x, (queries, keys) if look else ()


class FinalLayer(nn.Module):
    """adaLN and a linear map of each token to its patch, ``[B, T, D]`` → ``[B, T, p · p · C]``.

    Attributes:
        linear_cls: the map of a token that is no patch, where the network has one.
    """

    linear_cls: nn.Linear

    def __init__(self, width: int, patch_size: int, channels: int, *, rms_norm: bool = False) -> None:
        super().__init__()
        self.norm_final = token_norm(width, rms=rms_norm)
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return patches ``[B, T, p · p · C]``, channels last."""
        patches: Tensor = self.linear(self.modulated(x, embedding))
        return patches

    def modulated(self, x: Tensor, embedding: Tensor, groups: TokenGroups | None = None) -> Tensor:
        """Return the tokens ``[B, T, D]`` after adaLN, each with its group's where there are groups."""
        shift, scale = (
            _per_token(each, groups) for each in self.adaLN_modulation(embedding).chunk(2, dim=-1)
        )
        return modulate(self.norm_final(x), shift, scale)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Rearrange the patches of a grid to images, ``[B, T, p · p · C]`` → ``[B, C, h, w]``.

    Args:
        patches: of the final layer, channels last.
        grid: rows and columns of the tokens.
        patch_size: p.
    """
    (rows, columns), p = grid, patch_size
    image = patches.reshape(len(patches), rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(len(patches), -1, rows * p, columns * p)


def initialise_transformer(network: nn.Module, *, conditioners: tuple[str, ...]) -> None:
    """Draw Xavier uniform linears with zero bias and time embeddings of N(0, 0.02).

    AdaLN and output are zero.

    Args:
        network: a transformer of these layers.
        conditioners: names of its submodules that have initialised themselves.
    """
    apart = tuple(f"{name}." for name in conditioners)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(apart):
            initialise_linear(module)
    for module in network.modules():
        if isinstance(module, PatchEmbedding):
            # a convolution that acts as one linear map per patch
            nn.init.xavier_uniform_(module.proj.weight.view(module.proj.out_channels, -1))
            nn.init.zeros_(bias_of(module.proj))
        elif isinstance(module, TimestepEmbedding):
            for layer in module.mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=EMBEDDING_STD)
        elif isinstance(module, FinalLayer):
            nn.init.zeros_(module.linear.weight)
    for name, parameter in network.named_parameters():
        if name.endswith("adaLN_modulation.1.weight"):
            nn.init.zeros_(parameter)


def initialise_linear(linear: nn.Linear) -> None:
    """Draw a Xavier uniform weight and a zero bias, if any, as of every linear layer, projectors included."""
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def bias_of(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Return the bias of a layer that must have one.

    Raises:
        ValueError: it has none.
    """
    if layer.bias is None:
        raise ValueError("the layer has no bias")
    return layer.bias
