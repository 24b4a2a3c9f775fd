"""The tools that methods share, which are projectors, cosine alignment and the choice of teachers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.format.columns import PACKED, ColumnSpec, column_name, scale_column, split_column
from ...data.format.factor_layout import FactorLayout
from ...data.format.factors import unpack
from ...data.format.int8 import dequantise
from ..compiling import fused
from ..models.layers import initialise_linear

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BETA = 0.05
"""Where smooth-L1 turns from a parabola into a line (SRA's released code, and SRA 2)."""

NORM_FLOOR = 1e-12
"""Below this norm a token has no direction."""

STD_FLOOR = 0.05
"""Least standard deviation of a normalised channel, of the magnitude of its mean.

A channel that varies less counts as constant, which int8 and dead channels are. Without a floor iREPA would
make it (1 − γ)·10⁶ times itself, and the cosine would be its alone; so it becomes (1 − γ)·20 at most, which
at γ = 0.6 is 8 % of the squared length of 768 channels.
"""


def projector(width: int, hidden: int, teacher_width: int) -> nn.Sequential:
    """Build REPA's h_φ, three linear layers with SiLU between, Xavier weights and zero biases.

    Args:
        width: channels of the student's tokens.
        hidden: channels of the two hidden layers, 2,048 in the paper.
        teacher_width: channels of the teacher's tokens.
    """
    layers = nn.Sequential(
        nn.Linear(width, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, teacher_width),
    )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            initialise_linear(layer)
    return layers


class GridConvolution(nn.Module):
    """One convolution over the grid of the tokens, zeros around it, with torch's own initialisation."""

    def __init__(self, width: int, teacher_width: int, grid: tuple[int, int], kernel: int) -> None:
        super().__init__()
        self._grid = grid
        self.projection_layer = nn.Conv2d(width, teacher_width, kernel, padding=kernel // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[B, T, teacher_width]`` of row-major tokens ``[B, T, width]``."""
        images = tokens.mT.reshape(len(tokens), -1, *self._grid)
        convolved: Tensor = self.projection_layer(images)
        return convolved.flatten(-2).mT


@fused
def normalise_in_space(tokens: Tensor, gamma: float) -> Tensor:
    """Return (z − γ·mean z) / (std z + 1e-6), mean and std over the tokens of each image and channel.

    The std is that of a sample, and at least `STD_FLOOR` of the mean. Computed in float32 or better.

    Args:
        tokens: ``[B, T, D]``.
        gamma: γ.
    """
    tokens = _at_least_float32(tokens)
    mean = tokens.mean(-2, keepdim=True)
    std = tokens.std(-2, keepdim=True, correction=min(1, tokens.shape[-2] - 1))
    return (tokens - gamma * mean) / (std.maximum(STD_FLOOR * mean.abs()) + 1e-6)


@fused
def cosine_similarity(tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the cosine of each token with its target, in float32 or better whatever comes in.

    A token or target of zero norm has no direction: its cosine is 0 and it sends no gradient.

    *Targets stored in float16.* Rounding to nearest changes an element z_i by at most u·|z_i| with u = 2⁻¹¹,
    or by 2⁻²⁵ where z_i is subnormal (below 2⁻¹⁴); so a token z of D elements becomes z + e with
    ‖e‖ ≤ η·‖z‖, η = u + 2⁻²⁵·√D / ‖z‖. Its direction turns by an angle θ with sin θ ≤ η, the unit vectors
    differ by 2·sin(θ/2) ≤ η / √(1 − η²), and so does, at most, the cosine with any fixed direction. For
    ‖z‖ ≥ 1 and D = 1,024 that is 4.9e-4, and the REPA loss, a mean of such cosines, moves by no more.
    Beyond 65,504 float16 has no numbers: such features do not fit.

    Args:
        tokens: ``[B, T, D]``.
        targets: ``[B, T, D]``.

    Returns:
        ``[B, T]``.
    """
    tokens, targets = _at_least_float32(tokens), _at_least_float32(targets)
    product = (tokens * targets).sum(-1)
    norms = torch.linalg.vector_norm(tokens, dim=-1).clamp_min(NORM_FLOOR) * (
        torch.linalg.vector_norm(targets, dim=-1).clamp_min(NORM_FLOOR)
    )
    directed = (tokens.detach().abs().amax(-1) > NORM_FLOOR) & (targets.abs().amax(-1) > NORM_FLOOR)
    return torch.where(directed, product, 0) / torch.where(directed, norms, 1)


@fused
def smooth_l1(tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of d²/(2β) where |d| < β and |d| − β/2 elsewhere, in float32 or better.

    Args:
        tokens: of any shape.
        targets: of the same shape.

    Returns:
        A scalar.
    """
    tokens, targets = _at_least_float32(tokens), _at_least_float32(targets)
    loss: Tensor = F.smooth_l1_loss(tokens, targets, beta=BETA)
    return loss


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def stored_columns(column: str, specs: Mapping[str, ColumnSpec]) -> tuple[str, ...]:
    """Name what must be read to know a column, itself and, if it has some, its scales.

    Args:
        column: name of the column.
        specs: columns that there are; one that is not among them is named as it is.
    """
    if scale_column(column) in specs:
        return column, scale_column(column)
    return (column,)


def target(
    columns: Mapping[str, Tensor], column: str, specs: Mapping[str, ColumnSpec], *, at: int | None = None
) -> Tensor:
    """Decode a column's values where they lie. Int8 becomes float32, what is stored as floats is returned.

    Args:
        columns: column → values as stored, ``[B, …]``, at least those of `stored_columns`.
        column: name of the column.
        specs: columns that there are.
        at: index on the first axis after the batch, the only one to decode; None decodes all.

    Returns:
        ``[B, …]`` in a floating point dtype, without that axis if an index was given.
    """
    values, *scale = (
        columns[name] if at is None else columns[name][:, at] for name in stored_columns(column, specs)
    )
    return dequantise(values, *scale) if scale else values


def attention_target(
    columns: Mapping[str, Tensor],
    names: Sequence[str],
    specs: Mapping[str, ColumnSpec],
    notes: Mapping[str, Any],
    *,
    at: int,
) -> tuple[Tensor, Tensor]:
    """Decode the queries and keys of one block of a teacher where they lie.

    Args:
        columns: column → values as stored, ``[B, …]``, at least those of `stored_columns`.
        names: columns of the queries and of the keys.
        specs: columns that there are.
        notes: of their source.
        at: index of the block among those stored.

    Returns:
        Queries and keys in a floating point dtype, each ``[B, H, T, r]``.
    """
    queries, keys = names
    if specs[queries].dtype != PACKED:
        return target(columns, queries, specs, at=at), target(columns, keys, specs, at=at)
    layout = FactorLayout.of_notes(notes)
    return unpack(layout, at, columns[queries], columns[keys], columns[scale_column(queries)])


def choose_teachers(asked: Sequence[str], columns: Mapping[str, ColumnSpec], *kinds: str) -> tuple[str, ...]:
    """Return the teachers that a method takes its targets from.

    Args:
        asked: the configured ones; none means the cache's only one.
        columns: columns of the cache.
        kinds: kinds of the columns that are needed, as ``patch``.

    Returns:
        Each of those that has all the columns, once; none where nothing was asked and several could be meant.
    """
    present = teachers_with(columns, *kinds)
    if asked:
        return tuple(name for name in dict.fromkeys(asked) if name in present)
    return present if len(present) == 1 else ()


def teachers_with(columns: Mapping[str, ColumnSpec], *kinds: str) -> tuple[str, ...]:
    """Return the teachers of a cache that have columns of all these kinds."""
    sources = dict.fromkeys(split_column(name)[0] for name in columns if "/" in name)
    return tuple(source for source in sources if all(column_name(source, kind) in columns for kind in kinds))
