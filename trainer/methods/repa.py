"""REPA aligns one hidden state with a teacher's patch tokens (Yu et al., arXiv 2410.06940)."""

from __future__ import annotations

from abc import abstractmethod
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
from .relations import Pairs, manifold_distance
from .requirements import AlignsFirst, DepthWithin, HasPreset, NeedsColumn, SameGrid

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class PatchConfig(AligningConfig):
    """Settings of every method that aligns one hidden state with patch tokens.

    Attributes:
        weight: λ, constant (paper: 0.5).
        depth: block whose output is aligned, counted from 1; None takes the preset of the backbone's size.
        encoders: teachers, averaged; none takes the cache's only one.
        relations: w, adds λ·w times the distance of the cosines between pairs of tokens (U-REPA: 3); none
            leaves it out.
    """

    weight: Annotated[float, Ge(0)] = 0.5
    depth: int | None = None
    encoders: tuple[str, ...] = ()
    relations: Annotated[float, Ge(0)] | None = None


@dataclass(frozen=True, kw_only=True)
class RepaConfig(PatchConfig):
    """Settings of REPA.

    Attributes:
        projector_width: channels of the projector's hidden layers (paper: 2,048).
    """

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
    # paper, appendix K; the other is ours, for the demo
    "MMDiT-24": RepaConfig(depth=8),
    "MMDiT-6": RepaConfig(depth=4),
}


class PatchAlignment(Aligning):
    """Base of methods with L = L_v + λ·(L_REPA + w·L_ML), which differ in how projector and target are made.

    L_REPA = −mean over tokens and batch of cos(z, h_φ(h)), where z is the target made of the teacher's patch
    tokens, h the output of block `depth`, h_φ the projector. L_ML, U-REPA's manifold term, is there if w is
    set. Several teachers have one projector each and their losses are averaged, as in the released code.

    Attributes:
        kinds: of the columns that each teacher must have.
        relation_pairs: which tokens L_ML pairs, see `manifold_distance`.
    """

    config: PatchConfig
    config_class = PatchConfig
    kinds: ClassVar[tuple[str, ...]] = ("patch",)
    relation_pairs: Pairs = "image"
    requires: ClassVar[tuple[Requirement, ...]] = (
        NeedsColumn("patch"),
        HasPreset("depth"),
        AlignsFirst("stop"),
        DepthWithin("depth"),
        SameGrid(patch="depth"),
    )

    def __init__(
        self,
        config: PatchConfig,
        backbone: BackboneFacts,
        columns: Mapping[str, ColumnSpec],
        grids: Mapping[str, tuple[int, int]],
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(config, backbone, columns, grids, notes)
        self.teachers = choose_teachers(config.encoders, columns, *self.kinds)
        self._targets = tuple(column_name(name, "patch") for name in self.teachers)
        depth = self.config.depth or 0
        exists = backbone.has_block(depth)
        width = backbone.width_of(depth) if exists else backbone.width
        grid = backbone.grid_of(depth) if exists else backbone.grid
        self.projectors = nn.ModuleList(
            self.make_projector(width, columns[name].shape[-1], grid) for name in self._targets
        )

    @abstractmethod
    def make_projector(self, width: int, teacher_width: int, grid: tuple[int, int]) -> nn.Module:
        """Build h_φ for one teacher, from hidden states ``[B, T, width]`` to ``[B, T, teacher_width]``.

        Args:
            width: channels of the hidden state.
            teacher_width: channels of the teacher's tokens.
            grid: rows and columns of the hidden state's tokens.
        """

    def make_target(self, tokens: Tensor) -> Tensor:
        """Return z, which is made of the teacher's tokens ``[B, T, D]`` in floating point."""
        return tokens

    def aligned_columns(self) -> tuple[str, ...]:
        """Return the patch tokens of every teacher, with their scales where they are stored as int8."""
        return tuple(each for name in self._targets for each in stored_columns(name, self.specs))

    def aligned_capture(self) -> Capture:
        """Ask for the output of block `depth`."""
        return NOTHING if self.config.depth is None else Capture(hidden=(self.config.depth,))

    def tapped(self, step: Step) -> Tensor:
        """Return h, what is projected, ``[B, T, D]``."""
        assert self.config.depth is not None, "a missing depth is reported before step 0"
        return step.student.hidden[self.config.depth]

    def target_of(self, columns: Mapping[str, Tensor], name: str) -> Tensor:
        """Return z of the teacher of one column, ``[B, T, D]``, of the columns as stored."""
        return self.make_target(target(columns, name, self.specs))

    def aligned_losses(self, step: Step) -> dict[str, Term]:
        """Return the terms of the alignment, by name."""
        return self.compared(self.aligned_sides(step), self.weight_at(step))

    def weight_at(self, step: Step) -> float:
        """Return λ of a step."""
        del step
        return self.config.weight

    def aligned_sides(self, step: Step) -> list[tuple[Tensor, Tensor]]:
        """Return ŷ and z, the projected tokens and the target, of every teacher, both ``[B, T, D]``."""
        hidden = self.tapped(step)
        return [
            (project(hidden), self.target_of(step.columns, name))
            for project, name in zip(self.projectors, self._targets, strict=True)
        ]

    def compared(self, sides: list[tuple[Tensor, Tensor]], weight: float) -> dict[str, Term]:
        """Return ``repa``, −1 when the projected tokens point where the targets point, and ``relations``.

        Args:
            sides: as of `aligned_sides`.
            weight: λ.
        """
        similarity = torch.stack([cosine_similarity(*each).mean() for each in sides]).mean()
        terms = {"repa": Term(value=-similarity, weight=weight)}
        if self.config.relations is not None:
            distances = [manifold_distance(*each, pairs=self.relation_pairs) for each in sides]
            value = torch.stack(distances).mean()
            terms["relations"] = Term(value=value, weight=weight * self.config.relations)
        return terms


class Repa(PatchAlignment):
    """REPA, whose h_φ is a three-layer MLP and whose z are the teacher's tokens as they are."""

    config: RepaConfig
    config_class = RepaConfig
    presets = PRESETS

    def make_projector(self, width: int, teacher_width: int, grid: tuple[int, int]) -> nn.Module:
        """Build the MLP, which sees one token at a time."""
        del grid
        return projector(width, self.config.projector_width, teacher_width)
