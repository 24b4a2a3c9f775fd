"""Teachers: frozen image encoders whose features are cached. `table` says which; `load_encoder` makes one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .teachers import TEACHERS, Teacher, find_teacher

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from .base import Encoder

__all__ = ["TEACHERS", "Teacher", "find_teacher", "load_encoder"]


def load_encoder(
    name: str,
    *,
    resolution: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    weights: Path | None = None,
    random_weights: bool = False,
) -> Encoder:
    """The teacher of a name, ready to encode.

    Args:
        name: one of `TEACHERS`.
        resolution: side of the cropped images, R.
        device: where it computes.
        dtype: of the forward pass: float32 (None), or bfloat16 or float16 for autocast; features are float32.
        weights: a file; None takes the shipped one (demo), else the hub's or its local copy.
        random_weights: draw the weights where no file is given and none is shipped.

    Raises:
        RepaError: unknown name, a resolution without a whole grid, no weights, or another model's.
    """
    import torch

    from .timm_vit import TimmEncoder

    return TimmEncoder(
        find_teacher(name),
        resolution=resolution,
        device=torch.device(device),
        dtype=dtype or torch.float32,
        weights=weights,
        random_weights=random_weights,
    )
