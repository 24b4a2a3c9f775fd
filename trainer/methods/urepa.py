"""U-REPA aligns the middle of a U-shaped network, where the grid is smaller than the teacher's.

Tian et al., arXiv 2503.18414, NeurIPS 2025. None of the authors' code could be had. What the paper leaves
open is ours, and said to be where it is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from ...data.format.columns import ColumnSpec, source_of
from .base import Requirement, Step, Term
from .relations import Pairs, mean_pair_cosine
from .repa import Repa, RepaConfig
from .requirements import (
    AlignsFirst,
    DepthWithin,
    GridDivides,
    HasPreset,
    NeedsColumn,
    OtherGrid,
    TakesEffect,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..models.capture import BackboneFacts


@dataclass(frozen=True, kw_only=True)
class UrepaConfig(RepaConfig):
    """Settings of U-REPA.

    Attributes:
        relations: w, adds λ·w times the manifold term, the distance of the cosines between pairs of tokens
            (paper: 3); none leaves it out.
        pairs: which tokens are paired there, those of one ``image`` (ours, as equation 3 reads) or those of
            the ``batch`` that a device sees at once.
        upsampling: how the projected tokens are brought to the teacher's grid, ``bilinear`` (ours) or
            ``nearest``.
    """

    relations: Annotated[float, Ge(0)] | None = 3.0
    pairs: Pairs = "image"
    upsampling: Literal["bilinear", "nearest"] = "bilinear"


class Upsampling(nn.Module):
    """Bring tokens from one grid to another, each channel by itself, as one product with a fixed matrix.

    On graphics cards the sums of a product come in the same order every time, those of the gradient of
    `torch.nn.functional.interpolate` do not.

    Args:
        grid: rows and columns of the tokens.
        to: rows and columns wanted.
        mode: ``bilinear``, without aligned corners, or ``nearest``.
    """

    matrix: Tensor

    def __init__(self, grid: tuple[int, int], to: tuple[int, int], mode: str) -> None:
        super().__init__()
        single = torch.eye(grid[0] * grid[1], dtype=torch.float64).reshape(-1, 1, *grid)
        columns = F.interpolate(single, size=to, mode=mode).flatten(1)
        self.register_buffer("matrix", columns.T.contiguous().float(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T', D]``, in float32 or better whatever autocast says."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.matrix.to(dtype) @ tokens.to(dtype)


class Urepa(Repa):
    """L = L_v + λ·(L_REPA + w·L_ML) with ŷ = up(h_φ(h)) in place of REPA's h_φ(h).

    h is the output of a middle block, and the MLP sees its tokens. Only what it returns is up-sampled to the
    teacher's grid: before the MLP or inside it is worse, and so is a smaller teacher (paper, table 6).
    """

    config: UrepaConfig
    config_class = UrepaConfig
    default_model = "SiT-down-B/2"
    presets: ClassVar[Mapping[str, UrepaConfig]] = {
        # of SiT-down: the paper's is XL, 18 of 36; ours for the others, the middle block as there
        size: UrepaConfig(depth=depth)
        for size, depth in (("T", 4), ("B", 8), ("L", 16), ("XL", 18))
    }
    requires: ClassVar[tuple[Requirement, ...]] = (
        NeedsColumn("patch"),
        HasPreset("depth"),
        AlignsFirst("stop"),
        DepthWithin("depth"),
        GridDivides(patch="depth"),
        OtherGrid("upsampling", patch="depth"),
        TakesEffect("pairs", unless=("relations", None)),
    )

    def __init__(
        self,
        config: UrepaConfig,
        backbone: BackboneFacts,
        columns: Mapping[str, ColumnSpec],
        grids: Mapping[str, tuple[int, int]],
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(config, backbone, columns, grids, notes)
        depth = self.config.depth or 0
        mine = backbone.grid_of(depth) if backbone.has_block(depth) else backbone.grid
        theirs = [self.grids[source_of(name)] for name in self._targets]
        self.upsamplings = nn.ModuleList(
            nn.Identity() if grid == mine else Upsampling(mine, grid, self.config.upsampling)
            for grid in theirs
        )
        self.relation_pairs = self.config.pairs

    def aligned_sides(self, step: Step) -> list[tuple[Tensor, Tensor]]:
        """Return ŷ and z of every teacher, both on the teacher's grid."""
        sides = zip(self.upsamplings, super().aligned_sides(step), strict=True)
        return [(upsampling(projected), tokens) for upsampling, (projected, tokens) in sides]

    def compared(self, sides: list[tuple[Tensor, Tensor]], weight: float) -> dict[str, Term]:
        """Return ``repa``, ``relations`` and, for the record, the mean cosine of two tokens on each side.

        A student whose tokens have all become one has a ``student_pair_cosine`` of 1.
        """
        with torch.no_grad():
            cosines = [torch.stack([mean_pair_cosine(tokens) for tokens in pair]) for pair in sides]
            student, teacher = torch.stack(cosines).mean(0).unbind()
        return {
            **super().compared(sides, weight),
            "student_pair_cosine": Term(value=student, weight=None),
            "teacher_pair_cosine": Term(value=teacher, weight=None),
        }
