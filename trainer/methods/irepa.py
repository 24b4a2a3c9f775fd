"""iREPA is REPA with a convolution for a projector and targets normalised in space (arXiv 2512.10794)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Le

from ...data.errors import RepaError
from .alignment import GridConvolution, normalise_in_space
from .repa import PatchAlignment, PatchConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class IrepaConfig(PatchConfig):
    """Settings of iREPA.

    Attributes:
        weight: λ, constant (released code: 1.0 on latents).
        kernel: side of the convolution, odd (paper: 3; the released configuration for latents: 1).
        gamma: γ, how much of a channel's mean over the image is taken out (released code: 0.6; paper: 0.6 to
            0.8).
    """

    weight: Annotated[float, Ge(0)] = 1.0
    kernel: Annotated[int, Ge(1), Le(31)] = 3
    gamma: Annotated[float, Ge(0), Le(1)] = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            what, remedy = f"method.kernel={self.kernel} has no middle", "set an odd side, as 3"
            raise RepaError(what, remedy, field="method.kernel")


class Irepa(PatchAlignment):
    """REPA's loss between a convolution of the hidden state and the normalised tokens."""

    config: IrepaConfig
    config_class = IrepaConfig
    # released code: 4 for B, else 8; ours for T: a third of the depth, as B's
    presets: ClassVar[Mapping[str, IrepaConfig]] = {
        size: IrepaConfig(depth=depth) for size, depth in (("T", 2), ("S", 8), ("B", 4), ("L", 8), ("XL", 8))
    }
    named_presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": {"kernel": 1}}

    def make_projector(self, width: int, teacher_width: int, grid: tuple[int, int]) -> nn.Module:
        """Build the convolution."""
        return GridConvolution(width, teacher_width, grid, self.config.kernel)

    def make_target(self, tokens: Tensor) -> Tensor:
        """Return the tokens normalised in space."""
        return normalise_in_space(tokens, self.config.gamma)
