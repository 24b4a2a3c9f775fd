"""HASTE joins REPA and attention alignment, and ends both after step τ (arXiv 2505.16792)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge

from ...data.format.columns import ATTENTION_KINDS, source_of
from .alignment import attention_target, stored_columns
from .attention import attention_alignment
from .base import Step, Term
from .repa import Repa, RepaConfig
from .requirements import (
    AlignsFirst,
    DepthWithin,
    HasPreset,
    HeadsFit,
    NeedsColumn,
    Paired,
    SameGrid,
    StoredAttention,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..models.capture import BackboneFacts, Capture
    from .base import MethodConfig


@dataclass(frozen=True, kw_only=True)
class HasteConfig(RepaConfig):
    """Settings of HASTE, which are those of REPA and of the attention.

    What is none or empty is the preset of the backbone's size.

    Attributes:
        weight: λ_R of the features (paper: 0.5).
        depth: block whose output is aligned with the teacher's tokens, counted from 1.
        encoders: teachers of the features, averaged, the first also of the attention; none takes the
            cache's only one.
        projector_width: channels of the projector's hidden layers (paper: 2,048).
        attention_weight: λ_A of the attention (paper: 0.5).
        student_blocks: blocks whose attention is aligned, counted from 1.
        teacher_blocks: the teacher's blocks, one for each of the student's, in order.
        stop: τ, the first step without alignment.
    """

    attention_weight: Annotated[float, Ge(0)] = 0.5
    student_blocks: tuple[int, ...] = ()
    teacher_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Preset(HasteConfig):
    """What HASTE aligns for a size of backbone.

    Attributes:
        teacher_depth: blocks of the teacher that `teacher_blocks` was chosen for.
    """

    teacher_depth: int = 12


_LARGE = Preset(depth=8, student_blocks=(5, 6, 7, 8), teacher_blocks=(9, 10, 11, 12), stop=250_000)

PRESETS: Mapping[str, Preset] = {
    # ours, for the demo and its teacher of six blocks
    "T": Preset(depth=4, student_blocks=(2, 3, 4), teacher_blocks=(4, 5, 6), stop=200, teacher_depth=6),
    # the others are the paper's, for DINOv2-B; it has none for S
    "B": Preset(depth=5, student_blocks=(3, 4, 5), teacher_blocks=(8, 10, 12), stop=100_000),
    "L": _LARGE,
    "XL": _LARGE,
}
STOPS_AT_512 = {"XL": 300_000}


class Haste(Repa):
    """L = L_v + λ_R·L_REPA + λ_A·L_ATTA while step < τ, then L_v alone.

    L_ATTA is the mean over pairs of blocks, heads and query rows of the cross entropy H(P_T, P_S) between the
    attention of the teacher and of the student over the patch tokens. The teacher's H_T heads are paired
    with the first H_T of the student's, index to index.
    """

    config: HasteConfig
    config_class = HasteConfig
    presets = PRESETS
    requires = (
        NeedsColumn("patch"),
        HasPreset("depth", "student_blocks", "teacher_blocks", "stop"),
        AlignsFirst("stop"),
        DepthWithin("depth", "student_blocks"),
        Paired("student_blocks", "teacher_blocks"),
        StoredAttention("teacher_blocks", teacher_depth="teacher_depth"),
        HeadsFit("q", "student_blocks"),
        SameGrid(patch="depth", q="student_blocks"),
    )

    @classmethod
    def preset_of(cls, backbone: BackboneFacts) -> MethodConfig | None:
        """Return the size's preset. On 512² images SiT-XL is aligned for longer."""
        preset, size = super().preset_of(backbone), backbone.size_name or ""
        if isinstance(preset, Preset) and backbone.resolution == 512 and size in STOPS_AT_512:
            return replace(preset, stop=STOPS_AT_512[size])
        return preset

    def aligned_columns(self) -> tuple[str, ...]:
        """Return tokens, queries and keys."""
        attention = [each for name in self._attention_columns() for each in stored_columns(name, self.specs)]
        return (*super().aligned_columns(), *attention)

    def attention_blocks(self) -> tuple[int, ...]:
        """Return the teacher's blocks."""
        return tuple(sorted(set(self.config.teacher_blocks)))

    def aligned_capture(self) -> Capture:
        """Ask for the output of block `depth`, and queries and keys of the student's blocks."""
        return replace(super().aligned_capture(), attention=tuple(dict.fromkeys(self.config.student_blocks)))

    def aligned_losses(self, step: Step) -> dict[str, Term]:
        """Return ``repa``, ``attention`` and, for the record, ``attention_excess``."""
        cross_entropy, excess = self._attention(step)
        return {
            **super().aligned_losses(step),
            "attention": Term(value=cross_entropy, weight=self.config.attention_weight),
            "attention_excess": Term(value=excess, weight=None),
        }

    def _attention_columns(self) -> tuple[str, ...]:
        # of the first teacher, there or not: what is missing is reported by the name the user gave it
        first = (self.config.encoders or self.teachers)[:1]
        return tuple(f"{teacher}/{kind}" for teacher in first for kind in ATTENTION_KINDS)

    def _attention(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the means over the pairs of blocks. Of the cache's blocks only those in use are decoded."""
        names = self._attention_columns()
        noted = self.notes[source_of(names[0])]
        values = []
        for mine, theirs in zip(self.config.student_blocks, self.config.teacher_blocks, strict=True):
            index = noted["blocks"].index(theirs)
            queries, keys = attention_target(step.columns, names, self.specs, noted, at=index)
            heads = queries.shape[1]
            values.append(
                torch.stack(
                    attention_alignment(
                        step.student.queries[mine][:, :heads],
                        step.student.keys[mine][:, :heads],
                        queries,
                        keys,
                        scale=step.student.queries[mine].shape[-1] ** -0.5,
                        teacher_scale=noted["logit_scale"],
                    )
                )
            )
        cross_entropy, excess = torch.stack(values).mean(0).unbind()
        return cross_entropy, excess.detach()
