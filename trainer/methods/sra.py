"""SRA pulls an early block at high noise towards a later block of the averaged weights (arXiv 2505.02831)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from ..compiling import fused
from ..models.capture import NOTHING, BackboneFacts, Capture, Captured
from ..models.layers import initialise_linear
from ..models.timesteps import STEPS, time_of
from ..objectives.token_times import TokenTimes
from .aligning import ALIGN, Aligning, AligningConfig
from .alignment import cosine_similarity, smooth_l1
from .base import Flags, Phase, Requirement, Step, Term, filled
from .requirements import AlignsFirst, DepthWithin, HasPreset, NoGroupEmpty, SameTokens, TakesEffect

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.format.columns import ColumnSpec


@dataclass(frozen=True, kw_only=True)
class SraConfig(AligningConfig):
    """Settings of SRA. A block that is none is the preset's of the backbone's size.

    Attributes:
        weight: w of the term; none is the paper's for smooth-L1, 0.2, of a DiT 0.04.
        distance: between the student's tokens and the teacher's, ``smooth-l1``, or 1 − cosine over the
            tokens of a channel or over the channels of a token.
        student_block: m, block whose output the head maps, counted from 1.
        teacher_block: n, block of the averaged weights that it is compared with.
        offset: the teacher's time is t − k with k uniform on [0, offset); where the network's time has steps,
            k is a whole number of them.
        decay_after: last epoch, from 0, of the full weight; none is the one of the released runs.
        decay_epochs: in how many epochs the weight then falls tenfold, 0 for never; none is that of the
            released runs.
        epoch_steps: steps of an epoch of that decay (ImageNet in batches of 256: 5,004).
        times: times of an image: ``one``, or ``two``, each of a random group of its tokens.
        separate: whether a token attends in training to the tokens of its own group alone.
        share: part of the tokens that is in the first group.
        whole: ρ, probability that an image has one group.
        teacher: what the averaged weights see of an image with two times: with ``offset`` each group at its
            own t − k, with ``self_flow`` the whole image at the smaller time, each token attending to all.
    """

    weight: Annotated[float, Ge(0)] | None = None
    distance: Literal["smooth-l1", "cosine-token", "cosine-channel"] = "smooth-l1"
    student_block: int | None = None
    teacher_block: int | None = None
    offset: Annotated[float, Ge(0), Le(1)] = 0.2
    decay_after: Annotated[int, Ge(0)] | None = None
    decay_epochs: Annotated[float, Ge(0)] | None = None
    epoch_steps: Annotated[int, Ge(1)] = 5004
    times: Literal["one", "two"] = "one"
    separate: bool = False
    share: Annotated[float, Gt(0), Lt(1)] = 0.25
    whole: Annotated[float, Ge(0), Le(1)] = 0.0
    teacher: Literal["offset", "self_flow"] = "offset"


PRESETS: Mapping[str, SraConfig] = {
    # ours, for the demo: a quarter and two thirds of the depth, as in SiT-B
    "T": SraConfig(student_block=2, teacher_block=4),
    # the others are the paper's; it has none for S
    "B": SraConfig(student_block=3, teacher_block=8),
    "L": SraConfig(student_block=6, teacher_block=16),
    "XL": SraConfig(student_block=8, teacher_block=20),
    "DiT-T": SraConfig(student_block=2, teacher_block=4, weight=0.04),
    "DiT-S": SraConfig(weight=0.04),
    "DiT-B": SraConfig(student_block=3, teacher_block=7, weight=0.04),
    "DiT-L": SraConfig(student_block=6, teacher_block=14, weight=0.04),
    "DiT-XL": SraConfig(student_block=8, teacher_block=16, weight=0.04),
}
LOSSES: Mapping[str, Mapping[str, Any]] = {
    # of all published numbers of SRA
    "paper": {"distance": "smooth-l1"},
    # the code since July 2026; tokens are the default axis of `torch.cosine_similarity`, and surely not meant
    "released": {"distance": "cosine-token", "weight": 0.5, "decay_epochs": 0},
    # the recommended run of arXiv 2607.02508
    "dts_as": {
        "distance": "cosine-token",
        "weight": 0.5,
        "decay_epochs": 0,
        "times": "two",
        "separate": True,
    },
    # equation 5 of the paper; the weight is ours
    "channel": {"distance": "cosine-channel", "weight": 0.5, "decay_epochs": 0},
}
# the decay is of the released code; the paper does not tell of it
DECAY = SraConfig(weight=0.2, decay_after=149, decay_epochs=1000)
DECAY_AT_512 = SraConfig(weight=0.2, decay_after=99, decay_epochs=800)


class Head(nn.Module):
    """Map D channels to D by two linear layers of 2·D channels between, with SiLU.

    The layers have the released names. Xavier weights, zero biases.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)
        for layer in (self.linear1, self.linear2):
            initialise_linear(layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[B, T, D]`` of ``[B, T, D]``."""
        mapped: Tensor = self.linear2(F.silu(self.linear1(tokens)))
        return mapped


class Sra(Aligning):
    """L = L_v + w·d(head(h), z′), where no teacher but the network's own average is needed.

    h is the output of block m at time t, z′ the raw output of block n of the averaged weights at t − k, of
    the same image, noise and condition, without head and without gradient.

    With two times (dual-timestep scheduling, arXiv 2607.02508) a random part of the tokens is noised at a
    time of its own. The teacher sees the same groups; sampling has one time and attends to all tokens.
    """

    config: SraConfig
    config_class = SraConfig
    presets = PRESETS
    named_presets = LOSSES
    requires: ClassVar[tuple[Requirement, ...]] = (
        HasPreset("student_block", "teacher_block"),
        AlignsFirst("stop"),
        DepthWithin("student_block", "teacher_block"),
        SameTokens("student_block", "teacher_block"),
        TakesEffect("share", times=("two",), separate=(True,)),
        TakesEffect("whole", times=("two",), separate=(True,)),
        TakesEffect("teacher", times=("two",)),
        TakesEffect("offset", teacher=("offset",)),
        TakesEffect("decay_after", unless=("decay_epochs", 0)),
        TakesEffect("epoch_steps", unless=("decay_epochs", 0)),
        NoGroupEmpty("share"),
    )

    def __init__(
        self,
        config: SraConfig,
        backbone: BackboneFacts,
        columns: Mapping[str, ColumnSpec],
        grids: Mapping[str, tuple[int, int]],
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(config, backbone, columns, grids, notes)
        self.config = filled(self.config, DECAY_AT_512 if backbone.resolution == 512 else DECAY)
        block = self.config.student_block or 0
        self.ap_head = Head(backbone.width_of(block) if backbone.has_block(block) else backbone.width)

    def aligned_capture(self) -> Capture:
        """Ask for the output of block m."""
        return NOTHING if self.config.student_block is None else Capture(hidden=(self.config.student_block,))

    def aligned_flags(self) -> Flags:
        """Say that the averaged weights teach."""
        return Flags(ema_forward=True)

    def draws(self, phase: Phase, count: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Draw k, float32 ``[B]``, or ``[B, 2]`` with two times, while there is a teacher."""
        if phase.name != ALIGN:
            return {}
        shape = (count, 2) if self.config.times == "two" else (count,)
        offset = self.config.offset * torch.rand(shape, generator=generator, device=generator.device)
        if self.backbone.stepped_time:
            offset = (offset * STEPS).floor() / STEPS
        return {"offset": offset}

    def token_times(self, phase: Phase) -> TokenTimes | None:
        """Return the two groups, where there are two times or separation, while there is a teacher."""
        config = self.config
        if phase.name != ALIGN or (config.times == "one" and not config.separate):
            return None
        return TokenTimes(
            shares=(config.share, 1 - config.share),
            separate=config.separate,
            one_time=config.times == "one",
            whole=config.whole,
        )

    def aligned_losses(self, step: Step) -> dict[str, Term]:
        """Return one term, ``sra``, and for the record both cosines and the norms of both sides."""
        assert self.config.student_block is not None, "a missing block is reported before step 0"
        student = self.ap_head(step.student.hidden[self.config.student_block])
        teacher = self._teach(step)
        cosines = {
            "cosine-channel": cosine_similarity(student, teacher).mean(),
            "cosine-token": cosine_similarity(student.mT, teacher.mT).mean(),
        }
        if self.config.distance == "smooth-l1":
            value = smooth_l1(student, teacher)
        else:
            value = 1 - cosines[self.config.distance]
        logged = {
            "sra_cosine_channel": cosines["cosine-channel"],
            "sra_cosine_token": cosines["cosine-token"],
            # neither side is normalised, and growing norms are how smooth-L1 is known to fail
            "sra_student_norm": _norm(student),
            "sra_teacher_norm": _norm(teacher),
        }
        return {
            "sra": Term(value=value, weight=self.weight_at(step.index)),
            **{name: Term(value=each.detach(), weight=None) for name, each in logged.items()},
        }

    def weight_at(self, step: int) -> float:
        """Return w at a step, which falls tenfold in every so many epochs after the last full one."""
        weight, after, epochs = self.config.weight, self.config.decay_after, self.config.decay_epochs
        assert weight is not None, "the constructor fills it"
        if not epochs or after is None:
            return weight
        late = max(step // self.config.epoch_steps - after, 0)
        return float(weight * 10 ** (-late / epochs))

    def _teach(self, step: Step) -> Tensor:
        """Return z′ ``[B, T, D]``."""
        block = self.config.teacher_block
        assert block is not None, "a missing block is reported before step 0"
        assert step.ema_forward is not None, "the flags ask for it"
        t = self._teacher_times(step.t, step.draws["offset"])
        capture = Capture(hidden=(block,), stop_after=block)
        captured: Captured = step.ema_forward(step.interpolate(t), t, capture)
        return captured.hidden[block]

    def _teacher_times(self, t: Tensor, offset: Tensor) -> Tensor:
        """Return the teacher's times, ``[B]`` or of the groups ``[B, 2]``."""
        if self.config.teacher == "self_flow":
            return t.amin(1) if t.ndim == 2 else t
        if offset.ndim < t.ndim:
            # groups that share a time share its offset
            offset = offset.unsqueeze(1)
        elif offset.ndim > t.ndim:
            # the angle of gradients is taken at one time of the whole image
            offset = offset[:, -1]
        # a stepped teacher never sees step 0, as released: its student of step 0 has a noisier one
        earliest, latest = (time_of(1.0), time_of(STEPS - 1.0)) if self.backbone.stepped_time else (0.0, 1.0)
        return (t - offset).clamp(earliest, latest)


@fused
def _norm(tokens: Tensor) -> Tensor:
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(tokens, dim=-1, dtype=dtype)
    return norms.mean()
