"""REPA aligns one hidden state with a teacher's patch tokens (Yu et al., arXiv 2410.06940)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from ...data.format.columns import ColumnSpec, column_name
from ..models.capture import NOTHING, BackboneFacts, Capture
from .aligning import Aligning, AligningConfig
from .alignment import choose_teachers, cosine_similarity, projector, stored_columns, target
from .base import Requirement, Step, Term
from .requirements import AlignsFirst, DepthWithin, HasPreset, NeedsColumn, SameGrid

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class RepaConfig(AligningConfig):
    """Settings of REPA.

    Attributes:
        weight: λ, constant (paper: 0.5).
        depth: block whose output is aligned, counted from 1; None takes the preset of the backbone's size.
        encoders: teachers, averaged; none takes the cache's only one.
        projector_width: channels of the projector's hidden layers (paper: 2,048).
    """

    weight: Annotated[float, Ge(0)] = 0.5
    depth: int | None = None
    encoders: tuple[str, ...] = ()
    projector_width: Annotated[int, Ge(1), Le(65_536)] = 2048


PRESETS: Mapping[str, RepaConfig] = {
    # ours: two thirds of the depth, as the paper's 8 of 12 in SiT-B
    "T": RepaConfig(depth=4),
    # the paper gives no S; the released code's default
    "S": RepaConfig(depth=8),
    # paper, table 2; for B the authors later found 4 better
    "B": RepaConfig(depth=8),
    "L": RepaConfig(depth=8),
    "XL": RepaConfig(depth=8),
}


class Repa(Aligning):
    """L = L_v + λ·L_REPA with L_REPA = −mean over tokens and batch of cos(z, h_φ(h)).

    z are the teacher's patch tokens, h the output of block `depth`, h_φ a three-layer MLP. Several teachers
    have one projector each and their losses are averaged, as in the released code.
    """

    config: RepaConfig
    config_class = RepaConfig
    presets = PRESETS
    requires: ClassVar[tuple[Requirement, ...]] = (
        NeedsColumn("patch"),
        HasPreset("depth"),
        AlignsFirst("stop"),
        DepthWithin("depth"),
        SameGrid(patch="depth"),
    )

    def __init__(
        self,
        config: RepaConfig,
        backbone: BackboneFacts,
        columns: Mapping[str, ColumnSpec],
        grids: Mapping[str, tuple[int, int]],
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(config, backbone, columns, grids, notes)
        self.teachers = choose_teachers(config.encoders, columns, "patch")
        self._targets = tuple(column_name(name, "patch") for name in self.teachers)
        depth = self.config.depth or 0
        exists = backbone.has_block(depth)
        width = backbone.width_of(depth) if exists else backbone.width
        grid = backbone.grid_of(depth) if exists else backbone.grid
        self.projectors = nn.ModuleList(
            self.make_projector(width, columns[name].shape[-1], grid) for name in self._targets
        )

    def make_projector(self, width: int, teacher_width: int, grid: tuple[int, int]) -> nn.Module:
        """Build h_φ for one teacher, from hidden states ``[B, T, width]`` to ``[B, T, teacher_width]``.

        Args:
            width: channels of the hidden state.
            teacher_width: channels of the teacher's tokens.
            grid: rows and columns of the hidden state's tokens.
        """
        del grid
        return projector(width, self.config.projector_width, teacher_width)

    def make_target(self, columns: Mapping[str, Tensor], name: str) -> Tensor:
        """Return z of one teacher, ``[B, T, D]``, from a batch's columns as stored."""
        return target(columns, name, self.specs)

    def aligned_columns(self) -> tuple[str, ...]:
        """Return the patch tokens of every teacher, with their scales where they are stored as int8."""
        return tuple(each for name in self._targets for each in stored_columns(name, self.specs))

    def aligned_capture(self) -> Capture:
        """Ask for the output of block `depth`."""
        return NOTHING if self.config.depth is None else Capture(hidden=(self.config.depth,))

    def aligned_losses(self, step: Step) -> dict[str, Term]:
        """Return one term, ``repa``, −1 when the projected tokens point where the targets point."""
        assert self.config.depth is not None, "a missing depth is reported before step 0"
        hidden = step.student.hidden[self.config.depth]
        similarities = [
            cosine_similarity(project(hidden), self.make_target(step.columns, name)).mean()
            for project, name in zip(self.projectors, self._targets, strict=True)
        ]
        return {"repa": Term(value=-torch.stack(similarities).mean(), weight=self.config.weight)}
