"""ERW warms up the first blocks on clean latents before the network learns to generate (arXiv 2504.10188).

The released code cannot train as it stands. Its formulas are kept where they can be told, and what is decided
otherwise is said where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt

from ..models.capture import NOTHING, Capture
from .aligning import PLAIN
from .base import FirstSteps, Flags, Phase, Requirement, Step
from .repa import Repa, RepaConfig
from .requirements import (
    AlignsFirst,
    Deeper,
    DepthWithin,
    HasPreset,
    NeedsColumn,
    SameGrid,
    SameTokens,
    TakesEffect,
    Where,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ..objectives.paths import Interpolant
    from ..objectives.times import TimeLaw

WARMUP = "warmup"
FULL = "full"
HALF_LIFE = 50_000 * 256
"""Images in which λ halves, which are the released code's 50,000 steps of 256."""


@dataclass(frozen=True, kw_only=True)
class ErwConfig(RepaConfig):
    """Settings of ERW, which are those of REPA and of the warm-up.

    Attributes:
        weight: λ at the first step after the warm-up (paper's table: 0.5), from where it falls.
        weight_by_size: multiply λ by 6 for XL and by 3 for L, as the released code does.
        half_life: images after the warm-up in which λ halves (released code: 50,000 steps of 256); none holds
            it.
        depth: block whose output is aligned after the warm-up, counted from 1.
        warmup_steps: W, steps of the warm-up; 0 does without, which is REPA.
        warmup_depth: k, the blocks that warm up and the block whose output is aligned meanwhile.
        warmup_weight: weight of the alignment in the warm-up, which has no other loss (released code: 0.5).
        warmup_from: run, or its checkpoint of step W, whose warm-up this one takes: it begins at step W.
    """

    weight_by_size: bool = False
    half_life: Annotated[float, Gt(0)] | None = HALF_LIFE
    warmup_steps: Annotated[int, Ge(0)] = 100_000
    warmup_depth: int | None = None
    warmup_weight: Annotated[float, Gt(0)] = 0.5
    warmup_from: str = ""


PRESETS: Mapping[str, ErwConfig] = {
    # ours: a third and two thirds of the depth
    "T": ErwConfig(warmup_depth=2, depth=4),
    # ours: the released code's default, as the paper has no S
    "S": ErwConfig(warmup_depth=4, depth=8),
    # 8 is the paper's, which does not tell the block behind it: ours
    "B": ErwConfig(warmup_depth=8, depth=10),
    # ours: the paper's blocks of XL, by the share of the depth
    "L": ErwConfig(warmup_depth=4, depth=15),
    # paper: the best of its tables
    "XL": ErwConfig(warmup_depth=5, depth=18),
}
RELEASED: Mapping[str, Any] = {
    "warmup_depth": 4,
    "weight": 1.0,
    "weight_by_size": True,
    "half_life": HALF_LIFE,
}
SIZE_FACTORS: Mapping[str, float] = {"XL": 6.0, "L": 3.0}


class Erw(Repa):
    """λ_w·L_REPA after block k for W steps, then L_v + λ(step)·L_REPA after a deeper block, all afresh.

    In the warm-up only the first k blocks run, on the clean latent at t = 0. At step W they and the projector
    go on as they are, the blocks behind begin as they were drawn, and the optimiser's moments and the
    averaged weights begin anew. L_REPA is REPA's, with one projector for both blocks. Per image seen since,
    λ falls by half_life.
    """

    config: ErwConfig
    config_class = ErwConfig
    presets = PRESETS
    named_presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # of its tables; how λ falls is not told there
        "paper": {"weight": 0.5, "warmup_steps": 100_000},
        # the defaults of the released code
        "released": {**RELEASED, "depth": 8, "warmup_steps": 10_000},
        # the command of its README
        "readme": {**RELEASED, "depth": 14, "warmup_steps": 100_000},
    }
    requires: ClassVar[tuple[Requirement, ...]] = (
        NeedsColumn("patch"),
        HasPreset("depth"),
        AlignsFirst("stop", warmup="warmup_steps"),
        DepthWithin("depth"),
        SameGrid(patch="depth"),
        Where(
            "warmup_steps",
            HasPreset("warmup_depth"),
            DepthWithin("warmup_depth"),
            Deeper("depth", than="warmup_depth"),
            SameTokens("warmup_depth", "depth"),
        ),
        *(
            TakesEffect(name, unless=("warmup_steps", 0))
            for name in ("warmup_depth", "warmup_weight", "warmup_from")
        ),
    )

    def phases(self) -> tuple[Phase, ...]:
        """Warm up in the first W steps, align until τ if there is one, and do nothing after."""
        first, stop = self.config.warmup_steps, self.config.stop
        warmup = (Phase(name=WARMUP, stop=first),) if first else ()
        if stop is None:
            return (*warmup, Phase(name=FULL, start=first))
        stop = max(stop, first)
        return *warmup, Phase(name=FULL, start=first, stop=stop), Phase(name=PLAIN, start=stop)

    def capture(self, phase: Phase) -> Capture:
        """Ask for the output of block k in the warm-up, where the network stops, and of `depth` after."""
        block = self.config.warmup_depth
        if phase.name != WARMUP:
            return super().capture(phase)
        return NOTHING if block is None else Capture(hidden=(block,), stop_after=block)

    def time_law(self, phase: Phase) -> TimeLaw | None:
        """Return the law whose times are 0, where the latent is clean, in the warm-up."""
        return _clean if phase.name == WARMUP else None

    def flags(self, phase: Phase) -> Flags:
        """Say that the warm-up has no loss but the alignment, and that all starts afresh after it."""
        if phase.name == WARMUP:
            return Flags(objective_loss=False)
        return Flags(fresh_start=True) if phase.name == FULL else super().flags(phase)

    def tapped(self, step: Step) -> Tensor:
        """Return the output of the one block that is captured, ``[B, T, D]``."""
        (hidden,) = step.student.hidden.values()
        return hidden

    def weight_at(self, step: Step) -> float:
        """Return λ of a step.

        After the warm-up it is λ_W · 2^(−n / half_life), n the images seen since.
        """
        config = self.config
        since = step.index - config.warmup_steps
        if since < 0:
            return config.warmup_weight
        size = self.backbone.size_name or ""
        weight = config.weight * (SIZE_FACTORS.get(size, 1.0) if config.weight_by_size else 1.0)
        if config.half_life is None:
            return weight
        return float(weight * 2 ** (-since * step.batch_size / config.half_life))

    def first_steps(self) -> FirstSteps | None:
        """Name the run whose warm-up is taken, and what has to be the same there."""
        config = self.config
        if not config.warmup_from or not config.warmup_steps:
            return None
        same = ("warmup_depth", "warmup_weight", "relations", "projector_width")
        return FirstSteps(run=config.warmup_from, step=config.warmup_steps, same=same, setting="warmup_from")


def _clean(count: int, path: Interpolant, generator: torch.Generator) -> Tensor:
    del path
    return torch.zeros(count, device=generator.device)
