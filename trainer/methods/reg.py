"""REG denoises the teacher's class token beside the latent (Wu et al., arXiv 2507.01467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from annotated_types import Ge

from ...data.format.columns import column_name, split_column
from .base import Denoised, Requirement
from .repa import Repa, RepaConfig
from .requirements import AlignsFirst, DepthWithin, HasPreset, NeedsColumn, SameGrid, SameWidth

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .base import Step

CLS = "cls"


@dataclass(frozen=True, kw_only=True)
class RegConfig(RepaConfig):
    """Settings of REG, which are those of REPA and of the class token.

    Attributes:
        cls_weight: β of the class token's velocity loss (paper: 0.03).
        standardise: denoise the class token with each channel brought to mean 0 and deviation 1 (released
            code: as it is). β belongs to the scale. Its target of the alignment stays as it is.
    """

    cls_weight: Annotated[float, Ge(0)] = 0.03
    standardise: bool = False


PRESETS: Mapping[str, RegConfig] = {
    # ours: a third of the depth, as the paper's 4 of 12 in SiT-B
    "T": RegConfig(depth=2),
    # ours: the paper has no S, which is as deep as B
    "S": RegConfig(depth=4),
    # paper and released code
    "B": RegConfig(depth=4),
    "L": RegConfig(depth=8),
    "XL": RegConfig(depth=8),
}


class Reg(Repa):
    """L = L_v + β·L_c + λ·L_REPA, where L_c is the velocity loss of the class token.

    The class token of the first teacher, as the cache stores it, is noised with noise of its own at the
    latent's time, and goes through the network as one more token. L_REPA is over that token and the patches,
    with one projector; the class token's own target is the class token. Of further teachers L_REPA has the
    tokens, and their class tokens are targets alone.
    """

    config: RegConfig
    config_class = RegConfig
    presets = PRESETS
    kinds = ("patch", CLS)
    requires: ClassVar[tuple[Requirement, ...]] = (
        NeedsColumn(*kinds),
        HasPreset("depth"),
        AlignsFirst("stop"),
        DepthWithin("depth"),
        SameGrid(patch="depth"),
        SameWidth("patch", CLS),
    )

    def denoised(self) -> tuple[Denoised, ...]:
        """Name the class token of the first teacher."""
        if not self.teachers:
            return ()
        column = column_name(self.teachers[0], CLS)
        return (
            Denoised(
                name=CLS,
                column=column,
                width=self.specs[column].shape[-1],
                weight=self.config.cls_weight,
                standardised=self.config.standardise,
            ),
        )

    def aligned_columns(self) -> tuple[str, ...]:
        """Return patch tokens, with their scales where they are stored as int8, and class tokens."""
        return (*super().aligned_columns(), *(column_name(name, CLS) for name in self.teachers))

    def tapped(self, step: Step) -> Tensor:
        """Return the class token and the patches after block `depth`, ``[B, 1 + T, D]``."""
        leading = step.student.leading[self.config.depth or 0]
        return torch.cat([leading, super().tapped(step)], dim=1)

    def target_of(self, columns: Mapping[str, Tensor], name: str) -> Tensor:
        """Return the class token and the patches of one teacher, ``[B, 1 + T, D]``."""
        patches = super().target_of(columns, name)
        cls = columns[column_name(split_column(name)[0], CLS)]
        # what was stored as int8 is float32 by now, the class token beside it float16
        dtype = torch.promote_types(cls.dtype, patches.dtype)
        return torch.cat([cls.to(dtype).unsqueeze(1), patches.to(dtype)], dim=1)
