"""SRA 2 has an early block say the clean latent (arXiv 2601.17830, no code is published: our reading)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Le
from torch import Tensor, nn

from ...data.format.columns import MOMENTS
from ..models.capture import NOTHING, BackboneFacts, Capture
from ..models.layers import initialise_linear, unpatchify
from .aligning import Aligning, AligningConfig
from .alignment import smooth_l1
from .base import Requirement, Step, Term
from .requirements import AlignsFirst, DepthWithin, HasPreset

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.format.columns import ColumnSpec


@dataclass(frozen=True, kw_only=True)
class Sra2Config(AligningConfig):
    """Settings of SRA 2.

    Attributes:
        weight: λ, constant (paper: 1).
        depth: block whose output is mapped to the latent, counted from 1; None takes the preset of the
            backbone's size.
        layers: linear layers of the head, with SiLU between (paper: 5).
        head_width: channels between them; None takes twice the block's, which is ours.
    """

    weight: Annotated[float, Ge(0)] = 1.0
    depth: int | None = None
    layers: Annotated[int, Ge(1), Le(32)] = 5
    head_width: Annotated[int, Ge(1), Le(65_536)] | None = None


PRESETS: Mapping[str, Sra2Config] = {
    # ours: a sixth of the depth, as in B
    "T": Sra2Config(depth=1),
    # the others are the paper's; it has none for S
    "B": Sra2Config(depth=2),
    "L": Sra2Config(depth=8),
    "XL": Sra2Config(depth=8),
}


class Sra2(Aligning):
    """L = L_v + λ·d(head(h), x₀) with smooth-L1 d, mean over images, pixels and channels.

    h is the output of block `depth`, x₀ the clean latent of the step, scaled as the network is given it. The
    head maps each token to its patch.
    """

    config: Sra2Config
    config_class = Sra2Config
    presets = PRESETS
    requires: ClassVar[tuple[Requirement, ...]] = (
        HasPreset("depth"),
        AlignsFirst("stop"),
        DepthWithin("depth"),
    )

    def __init__(
        self,
        config: Sra2Config,
        backbone: BackboneFacts,
        columns: Mapping[str, ColumnSpec],
        grids: Mapping[str, tuple[int, int]],
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(config, backbone, columns, grids, notes)
        # blocks and columns that are not there are reported before step 0
        block = self.config.depth if backbone.has_block(self.config.depth or 0) else None
        width = backbone.width if block is None else backbone.width_of(block)
        self._grid = backbone.grid if block is None else backbone.grid_of(block)
        self._patch = backbone.patch_size * backbone.grid[0] // self._grid[0]
        channels = backbone.channels or (columns[MOMENTS].shape[0] // 2 if MOMENTS in columns else 1)
        hidden = config.head_width or 2 * width
        widths = [width, *[hidden] * (config.layers - 1), channels * self._patch**2]
        self.head = nn.Sequential()
        for number, (before, after) in enumerate(pairwise(widths)):
            if number:
                self.head.append(nn.SiLU())
            self.head.append(layer := nn.Linear(before, after))
            initialise_linear(layer)

    def aligned_capture(self) -> Capture:
        """Ask for the output of block `depth`."""
        return NOTHING if self.config.depth is None else Capture(hidden=(self.config.depth,))

    def latent_of(self, hidden: Tensor) -> Tensor:
        """Return the latent ``[B, C, h, w]`` that the head makes of a block's tokens ``[B, T, D]``."""
        return unpatchify(self.head(hidden), self._grid, self._patch)

    def aligned_losses(self, step: Step) -> dict[str, Term]:
        """Return one term, ``sra2``."""
        assert self.config.depth is not None, "a missing depth is reported before step 0"
        found = self.latent_of(step.student.hidden[self.config.depth])
        return {"sra2": Term(value=smooth_l1(found, step.x0), weight=self.config.weight)}
