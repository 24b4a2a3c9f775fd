"""What the methods share: projectors, cosine alignment, the choice of teachers, problems that recur."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...data.format.columns import AUTOENCODER, ColumnSpec, model_of, scale_column, source_of, split_column
from ...data.format.int8 import dequantise
from ...data.units import counted
from ..models.layers import initialise_linear
from .base import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..models.capture import BackboneFacts

NORM_FLOOR = 1e-12
"""Below this norm a token has no direction."""


def projector(width: int, hidden: int, teacher_width: int) -> nn.Sequential:
    """REPA's h_φ: Linear, SiLU, Linear, SiLU, Linear; Xavier weights and zero biases as the whole model.

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


def cosine_similarity(tokens: Tensor, targets: Tensor) -> Tensor:
    """Cosine of each token with its target, in float32 or better whatever comes in.

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


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def stored_columns(column: str, specs: Mapping[str, ColumnSpec]) -> tuple[str, ...]:
    """What must be read to know a column: itself and, if it is stored as int8, its scales.

    Args:
        column: name of the column.
        specs: columns that there are; one that is not among them is named as it is.
    """
    if column in specs and specs[column].dtype == "int8":
        return column, scale_column(column)
    return (column,)


def target(
    columns: Mapping[str, Tensor], column: str, specs: Mapping[str, ColumnSpec], *, at: int | None = None
) -> Tensor:
    """A column's values, decoded where they lie: int8 becomes float32, what is stored as floats is returned.

    Args:
        columns: column → values as stored, ``[B, …]``, at least those of `stored_columns`.
        column: name of the column.
        specs: columns that there are.
        at: place on the first axis after the batch, the only one to decode; None decodes all.

    Returns:
        ``[B, …]`` in a floating point dtype, without that axis if a place was given.
    """
    values, *scale = (
        columns[name] if at is None else columns[name][:, at] for name in stored_columns(column, specs)
    )
    return dequantise(values, *scale) if scale else values


def choose_teachers(
    asked: Sequence[str], columns: Mapping[str, ColumnSpec], kind: str
) -> tuple[tuple[str, ...], list[Problem]]:
    """The teachers a method takes its targets from.

    Args:
        asked: the configured ones; none means the cache's only one.
        columns: columns of the cache.
        kind: kind of the column that is needed, ``patch``.

    Returns:
        Teachers that have the column, and the problems of the others or of the choice.
    """
    present = tuple(source for source, have in map(split_column, _of_sources(columns)) if have == kind)
    if not asked and len(present) == 1:
        return present, []
    if not asked and not present:
        return (), [
            Problem(
                what=f"the cache has no teacher with a {kind} column (it has {', '.join(columns) or 'none'})",
                remedy="add one with `repa preprocess --encoder dinov2-b` on this cache",
            )
        ]
    if not asked:
        return (), [
            Problem(
                what=f"the cache has {len(present)} teachers ({', '.join(present)}) and none was chosen",
                remedy=f"choose with `--set method.encoders=[{present[0]}]`; several are averaged",
            )
        ]
    problems = [
        Problem(
            what=f"the cache has no column {name}/{kind} (teachers it has: {', '.join(present) or 'none'})",
            remedy=f"add it with `repa preprocess --encoder {name}` on this cache",
        )
        for name in dict.fromkeys(asked)
        if name not in present
    ]
    if len(set(asked)) < len(asked):
        problems.append(
            Problem(
                what=f"method.encoders names a teacher twice ({', '.join(asked)})", remedy="name each once"
            )
        )
    return tuple(name for name in dict.fromkeys(asked) if name in present), problems


def _of_sources(columns: Mapping[str, ColumnSpec]) -> list[str]:
    return [name for name in columns if "/" in name]


def block_problems(setting: str, block: int | None, backbone: BackboneFacts) -> list[Problem]:
    """Whether a configured block, counted from 1, exists.

    Args:
        setting: dotted name of the setting, for the remedy.
        block: the block; None when the size has no preset.
        backbone: the backbone's facts.
    """
    remedy = (
        f"set a block from 1 to {backbone.depth}, for example `--set {setting}={max(1, backbone.depth // 3)}`"
    )
    if block is None:
        return [
            Problem(what=f"{setting} has no preset for a backbone of depth {backbone.depth}", remedy=remedy)
        ]
    if not backbone.has_block(block):
        return [
            Problem(
                what=f"{setting} is {block}, the backbone has blocks 1 to {backbone.depth}", remedy=remedy
            )
        ]
    return []


def grid_problems(
    columns: Sequence[str],
    block: int,
    backbone: BackboneFacts,
    specs: Mapping[str, ColumnSpec],
    grids: Mapping[str, tuple[int, int]],
) -> list[Problem]:
    """Whether the tokens of targets lie on the grid of the backbone's tokens in a block.

    Args:
        columns: columns that are targets, the last axis but one of each its tokens.
        block: the block whose tokens are aligned.
        backbone: the backbone's facts.
        specs: columns of the cache.
        grids: source → rows and columns of its tokens.
    """
    problems = []
    grid = backbone.grid_of(block)
    for column in columns:
        source = source_of(column)
        rows, cols = grids[source]
        tokens = specs[column].shape[-2]
        if rows * cols != tokens:
            problems.append(
                Problem(
                    what=f"{column} has {counted(tokens, 'token')} a row, its grid {rows}×{cols} has "
                    f"{rows * cols}",
                    remedy=f"the cache's manifest is damaged: write {source} again",
                )
            )
        elif (rows, cols) != grid:
            problems.append(
                Problem(
                    what=f"{column} has a {rows}×{cols} grid, the backbone {grid[0]}×{grid[1]} tokens",
                    remedy=_grid_remedy((rows, cols), grid, backbone, grids),
                )
            )
    return problems


def _grid_remedy(
    teacher: tuple[int, int],
    student: tuple[int, int],
    backbone: BackboneFacts,
    grids: Mapping[str, tuple[int, int]],
) -> str:
    """The model that has the teacher's grid, or the teachers that have the backbone's."""
    remedies = [f"--model {name}" for grid, name in backbone.siblings if grid == teacher]
    remedies += [
        f"--set method.encoders=[{name}], whose grid fits"
        for name, grid in grids.items()
        if grid == student and name != AUTOENCODER and name == model_of(name)
    ]
    if remedies:
        return "use " + ", or ".join(remedies)
    return (
        f"no model of this size fits it: add an encoder whose grid is {student[0]}×{student[1]} with "
        "`repa preprocess --encoder`"
    )
