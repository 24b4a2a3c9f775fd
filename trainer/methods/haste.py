"""HASTE: REPA and attention alignment together, both ended after step τ (arXiv 2505.16792)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...data.format.columns import ATTENTION_KINDS, ColumnSpec, attention_source, source_of
from ...data.units import counted
from ..models.capture import NOTHING, BackboneFacts, Capture
from .alignment import grid_problems, stored_columns, target
from .attention import attention_alignment
from .base import Flags, Phase, Problem, Step, Term
from .repa import Repa, RepaConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

ALIGN = "align"
PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What HASTE aligns for a size of backbone; blocks are counted from 1.

    Attributes:
        depth: block whose output is aligned with the teacher's tokens.
        student_blocks: blocks whose attention is aligned.
        teacher_blocks: blocks of the teacher, one for each of the student's, in order.
        teacher_depth: blocks of the teacher that this was chosen for.
        stop: τ, the first step without alignment.
    """

    depth: int
    student_blocks: tuple[int, ...]
    teacher_blocks: tuple[int, ...]
    teacher_depth: int
    stop: int


_LARGE = Preset(
    depth=8, student_blocks=(5, 6, 7, 8), teacher_blocks=(9, 10, 11, 12), teacher_depth=12, stop=250_000
)

PRESETS: Mapping[str, Preset] = {
    # ours, for the demo and its teacher of six blocks
    "T": Preset(depth=4, student_blocks=(2, 3, 4), teacher_blocks=(4, 5, 6), teacher_depth=6, stop=200),
    # the others are the paper's, for DINOv2-B; it has none for S
    "B": Preset(
        depth=5, student_blocks=(3, 4, 5), teacher_blocks=(8, 10, 12), teacher_depth=12, stop=100_000
    ),
    "L": _LARGE,
    "XL": _LARGE,
}
TOKENS_AT_512 = 1024
STOPS_AT_512 = {"XL": 300_000}


def preset_of(backbone: BackboneFacts) -> Preset | None:
    """The preset of a backbone's size; at 1,024 tokens, as in 512² images, SiT-XL is aligned for longer."""
    size = backbone.size_name or ""
    preset = PRESETS.get(size)
    rows, columns = backbone.grid
    if preset is not None and rows * columns == TOKENS_AT_512 and size in STOPS_AT_512:
        return replace(preset, stop=STOPS_AT_512[size])
    return preset


@dataclass(frozen=True, kw_only=True)
class HasteConfig(RepaConfig):
    """Settings of HASTE: those of REPA, and of the attention.

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

    attention_weight: float = 0.5
    student_blocks: tuple[int, ...] = ()
    teacher_blocks: tuple[int, ...] = ()
    stop: int | None = None


class Haste(Repa):
    """L = L_v + λ_R·L_REPA + λ_A·L_ATTA while step < τ, then L_v alone.

    L_ATTA is the mean over pairs of blocks, heads and query rows of the cross entropy H(P_T, P_S) between the
    attention of the teacher and of the student over the patch tokens. The teacher's H_T heads are paired
    with the first H_T of the student's, index to index.
    """

    config_class = HasteConfig
    config: HasteConfig

    def __init__(
        self,
        config: HasteConfig,
        backbone: BackboneFacts,
        columns: Mapping[str, ColumnSpec],
        grids: Mapping[str, tuple[int, int]],
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(config, backbone, columns, grids, notes)
        preset = preset_of(backbone)
        self.student_blocks = config.student_blocks or (preset.student_blocks if preset else ())
        self.teacher_blocks = config.teacher_blocks or (preset.teacher_blocks if preset else ())
        self.stop = preset.stop if config.stop is None and preset else config.stop
        teachers = config.encoders[:1] or self.teachers
        self.attention_teacher = teachers[0] if teachers else None

    def preset_depth(self) -> int | None:
        """The tap of HASTE's own preset."""
        preset = preset_of(self.backbone)
        return None if preset is None else preset.depth

    def phases(self) -> tuple[Phase, ...]:
        """Alignment before τ, nothing after."""
        if self.stop is None:
            return (Phase(name=ALIGN),)
        stop = max(self.stop, 0)
        return Phase(name=ALIGN, stop=stop), Phase(name=PLAIN, start=stop)

    def columns(self, phase: Phase) -> tuple[str, ...]:
        """Tokens, queries and keys before τ."""
        if phase.name == PLAIN:
            return ()
        attention = [each for name in self._attention_columns() for each in stored_columns(name, self.specs)]
        return (*super().columns(phase), *attention)

    def attention_blocks(self) -> tuple[int, ...]:
        """The teacher's blocks."""
        return tuple(sorted(set(self.teacher_blocks)))

    def capture(self, phase: Phase) -> Capture:
        """The output of block `depth`, queries and keys of the student's blocks; nothing after τ."""
        if phase.name == PLAIN:
            return NOTHING
        return replace(super().capture(phase), attention=tuple(dict.fromkeys(self.student_blocks)))

    def flags(self, phase: Phase) -> Flags:
        """After τ the projectors are idle."""
        return Flags(idle=("method.",)) if phase.name == PLAIN else Flags()

    def losses(self, step: Step) -> dict[str, Term]:
        """Before τ ``repa`` and ``attention``, and for the record ``attention_excess``; then none."""
        if self.phase_at(step.index).name == PLAIN:
            return {}
        cross_entropy, excess = self._attention(step)
        return {
            **super().losses(step),
            "attention": Term(value=cross_entropy, weight=self.config.attention_weight),
            "attention_excess": Term(value=excess, weight=None),
        }

    def _attention_columns(self) -> tuple[str, ...]:
        teacher = self.attention_teacher
        # whatever the user called it: a teacher that is not there is a problem, its column only missing
        return () if teacher is None else tuple(f"{teacher}/{kind}" for kind in ATTENTION_KINDS)

    def _attention(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Means over the pairs of blocks; of the cache's blocks only those in use are decoded."""
        queries_name, keys_name = self._attention_columns()
        heads, width = self.specs[queries_name].shape[1], self.backbone.width // self.backbone.heads
        noted = self.notes[attention_source(self.attention_teacher or "")]
        values = []
        for mine, theirs in zip(self.student_blocks, self.teacher_blocks, strict=True):
            place = noted["blocks"].index(theirs)
            values.append(
                torch.stack(
                    attention_alignment(
                        step.student.queries[mine][:, :heads],
                        step.student.keys[mine][:, :heads],
                        target(step.columns, queries_name, self.specs, at=place),
                        target(step.columns, keys_name, self.specs, at=place),
                        scale=width**-0.5,
                        teacher_scale=noted["logit_scale"],
                    )
                )
            )
        cross_entropy, excess = torch.stack(values).mean(0).unbind()
        return cross_entropy, excess.detach()

    def problems(self) -> list[Problem]:
        """REPA's, no preset, a τ that aligns nothing, blocks, heads or a grid that do not fit."""
        return [
            *super().problems(),
            *self._preset_problems(),
            *self._block_problems(),
            *self._target_problems(),
        ]

    def depth_problems(self) -> list[Problem]:
        """A missing preset is reported once, for all settings."""
        return [] if self.depth is None else super().depth_problems()

    def _preset_problems(self) -> list[Problem]:
        needed = {
            "method.depth": (self.depth, max(1, self.backbone.depth // 3)),
            "method.student_blocks": (self.student_blocks or None, max(1, self.backbone.depth // 3)),
            "method.teacher_blocks": (self.teacher_blocks or None, PRESETS["B"].teacher_depth),
            "method.stop": (self.stop, PRESETS["B"].stop),
        }
        missing = {name: example for name, (value, example) in needed.items() if value is None}
        if missing:
            size = f"SiT-{self.backbone.size_name}" if self.backbone.size_name else "this backbone"
            return [
                Problem(
                    what=f"haste has no preset for {size} (it has for {', '.join(PRESETS)}), and "
                    f"{', '.join(missing)} not set",
                    remedy="set all of them, for example "
                    f"`{' '.join(f'--set {name}={value}' for name, value in missing.items())}`",
                )
            ]
        if self.stop is not None and self.stop < 1:
            return [
                Problem(
                    what=f"method.stop is {self.stop}: the alignment would end before the first step",
                    remedy="set method.stop to a later step, or train without alignment: --method none",
                )
            ]
        return []

    def _block_problems(self) -> list[Problem]:
        problems = []
        outside = [block for block in self.student_blocks if not self.backbone.has_block(block)]
        if outside:
            problems.append(
                Problem(
                    what=f"method.student_blocks names {_listed(outside)}, the backbone has blocks 1 to "
                    f"{self.backbone.depth}",
                    remedy="choose of those with `--set method.student_blocks=[…]`",
                )
            )
        students, teachers = len(self.student_blocks), len(self.teacher_blocks)
        if students and teachers and students != teachers:
            problems.append(
                Problem(
                    what=f"method.student_blocks has {counted(students, 'block')} "
                    f"({_listed(self.student_blocks)}), method.teacher_blocks {teachers} "
                    f"({_listed(self.teacher_blocks)})",
                    remedy="name as many of the one as of the other: they are paired in order",
                )
            )
        return problems

    def _target_problems(self) -> list[Problem]:
        """Whether the cached attention is there, is whole and fits the backbone."""
        teacher = self.attention_teacher
        if teacher is None:
            return []
        names = self._attention_columns()
        missing = [name for name in names if name not in self.specs]
        blocks = _listed(self.teacher_blocks, ",") or "haste"
        if missing:
            return [
                Problem(
                    what=f"the cache has no attention targets of {teacher} ({', '.join(missing)})",
                    remedy=f"add them with `repa preprocess --encoder {teacher} --attention {blocks}` on "
                    "this cache",
                )
            ]
        source = attention_source(teacher)
        noted, specs = self.notes.get(source, {}), [self.specs[name] for name in names]
        stored = noted.get("blocks")
        whole = isinstance(stored, list | tuple) and isinstance(noted.get("logit_scale"), float | int)
        if not whole or specs[0].shape != specs[1].shape or specs[0].shape[:1] != (len(stored or ()),):
            return [
                Problem(
                    what=f"the manifest does not say of {source} which blocks and logits {names[0]} and "
                    f"{names[1]} hold",
                    remedy=f"the cache's manifest is damaged: write {source} again",
                )
            ]
        return [
            *self._stored_problems(teacher, stored or (), noted.get("depth")),
            *self._shape_problems(teacher, specs[0]),
        ]

    def _stored_problems(self, teacher: str, stored: tuple[int, ...], depth: int | None) -> list[Problem]:
        """Whether the blocks are there, and are meant: a preset's numbers are for a teacher of its depth."""
        preset = preset_of(self.backbone)
        if preset and not self.config.teacher_blocks and depth not in (None, preset.teacher_depth):
            return [
                Problem(
                    what=f"{teacher} has {counted(depth or 0, 'block')}, the preset of "
                    f"SiT-{self.backbone.size_name} is for a teacher of {preset.teacher_depth}",
                    remedy=f"choose of the cached blocks {_listed(stored)} with "
                    "`--set method.teacher_blocks=[…]`",
                )
            ]
        absent = [block for block in self.teacher_blocks if block not in stored]
        if not absent:
            return []
        return [
            Problem(
                what=f"the cache has the attention of blocks {_listed(stored)} of {teacher}, not of "
                f"{_listed(absent)}",
                remedy="choose of those with `--set method.teacher_blocks=[…]`, or write another cache with "
                f"`repa preprocess --encoder {teacher} --attention {_listed(self.teacher_blocks, ',')}`",
            )
        ]

    def _shape_problems(self, teacher: str, spec: ColumnSpec) -> list[Problem]:
        problems = []
        heads = spec.shape[1]
        if heads > self.backbone.heads:
            problems.append(
                Problem(
                    what=f"{teacher} has {heads} attention heads, the backbone {self.backbone.heads}: each "
                    "of the teacher's needs one",
                    remedy=f"use a --model with at least {heads} heads (SiT-B has 12, SiT-L and SiT-XL "
                    f"16), or an encoder with at most {self.backbone.heads}",
                )
            )
        column, tokens = self._attention_columns()[0], f"{teacher}/patch"
        # attention that does not fit for the same reason as the tokens was reported with them
        like_tokens = (
            tokens in self.specs
            and self.specs[tokens].shape[-2] == spec.shape[-2]
            and self.grids[source_of(tokens)] == self.grids[source_of(column)]
        )
        for block in () if like_tokens else self.student_blocks[:1]:
            if self.backbone.has_block(block):
                problems += grid_problems((column,), block, self.backbone, self.specs, self.grids)
        return problems


def _listed(blocks: tuple[int, ...] | list[int], separator: str = ", ") -> str:
    return separator.join(map(str, blocks))
