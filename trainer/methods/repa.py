"""REPA: align one hidden state with a teacher's patch tokens (Yu et al., arXiv 2410.06940)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import nn

from ...data.format.columns import ColumnSpec, column_name
from ..models.capture import NOTHING, BackboneFacts, Capture
from .alignment import (
    block_problems,
    choose_teachers,
    cosine_similarity,
    grid_problems,
    projector,
    stored_columns,
    target,
)
from .base import Method, MethodConfig, Phase, Problem, Step, Term

if TYPE_CHECKING:
    from collections.abc import Mapping

PRESET_DEPTHS = {
    # ours: two thirds of the depth, as the paper's 8 of 12 in SiT-B
    "T": 4,
    # the paper gives no S; the released code's default
    "S": 8,
    # paper, table 2; for B the authors later found 4 better
    "B": 8,
    "L": 8,
    "XL": 8,
}


@dataclass(frozen=True, kw_only=True)
class RepaConfig(MethodConfig):
    """Settings of REPA.

    Attributes:
        weight: λ, constant (paper: 0.5).
        depth: block whose output is aligned, counted from 1; None takes the preset of the backbone's size.
        encoders: teachers, averaged; none takes the cache's only one.
        projector_width: channels of the projector's hidden layers (paper: 2,048).
    """

    weight: float = 0.5
    depth: int | None = None
    encoders: tuple[str, ...] = ()
    projector_width: Annotated[int, Ge(1), Le(65_536)] = 2048


class Repa(Method):
    """L = L_v + λ·L_REPA with L_REPA = −mean over tokens and batch of cos(z, h_φ(h)).

    z are the teacher's patch tokens, h the output of block `depth`, h_φ a three-layer MLP. Several teachers
    have one projector each and their losses are averaged, as in the released code.
    """

    config_class = RepaConfig
    config: RepaConfig

    def __init__(
        self,
        config: RepaConfig,
        backbone: BackboneFacts,
        columns: Mapping[str, ColumnSpec],
        grids: Mapping[str, tuple[int, int]],
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(config, backbone, columns, grids, notes)
        self.depth = self.preset_depth() if config.depth is None else config.depth
        self.teachers, self._teacher_problems = choose_teachers(config.encoders, columns, "patch")
        self._targets = tuple(column_name(name, "patch") for name in self.teachers)
        self.projectors = nn.ModuleList(
            projector(backbone.width, config.projector_width, columns[name].shape[-1])
            for name in self._targets
        )

    def preset_depth(self) -> int | None:
        """The block whose output is aligned in a backbone of this size; None without a preset."""
        return PRESET_DEPTHS.get(self.backbone.size_name or "")

    def columns(self, phase: Phase) -> tuple[str, ...]:
        """The patch tokens of every teacher, with their scales where they are stored as int8."""
        del phase
        return tuple(each for name in self._targets for each in stored_columns(name, self.specs))

    def capture(self, phase: Phase) -> Capture:
        """The output of block `depth`."""
        del phase
        return NOTHING if self.depth is None else Capture(hidden=(self.depth,))

    def losses(self, step: Step) -> dict[str, Term]:
        """One term, ``repa``: −1 when the projected tokens point where the targets point."""
        assert self.depth is not None, "problems() reports a missing depth before step 0"
        hidden = step.student.hidden[self.depth]
        similarities = [
            cosine_similarity(project(hidden), target(step.columns, name, self.specs)).mean()
            for project, name in zip(self.projectors, self._targets, strict=True)
        ]
        return {"repa": Term(value=-torch.stack(similarities).mean(), weight=self.config.weight)}

    def problems(self) -> list[Problem]:
        """Teachers missing or ambiguous, a depth outside the backbone, a grid that is not the backbone's."""
        problems = [*self._teacher_problems, *self.depth_problems()]
        if self.depth is not None and self.backbone.has_block(self.depth):
            problems += grid_problems(self._targets, self.depth, self.backbone, self.specs, self.grids)
        return problems

    def depth_problems(self) -> list[Problem]:
        """What is wrong with the depth."""
        return block_problems("method.depth", self.depth, self.backbone)
