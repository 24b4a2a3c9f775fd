"""Teachers, the frozen image encoders whose features are cached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import OwnTeacher, Teacher
from .registry import find_teacher
from .teachers import TEACHERS

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from .base import Encoder

__all__ = ["TEACHERS", "Teacher", "find_teacher", "load_encoder"]


def load_encoder(
    teacher: str | Teacher,
    *,
    resolution: int,
    device: str | torch.device = "cpu",
    compute_dtype: str = "float32",
    weights: Path | None = None,
    random_weights: bool = False,
) -> Encoder:
    """Load a teacher, ready to encode.

    Args:
        teacher: from `find_teacher`, or a name that it takes without importing anything.
        resolution: side of the cropped images, R.
        device: where it computes.
        compute_dtype: of the forward pass, one of `COMPUTE_DTYPES`; features are float32.
        weights: a file; None takes the shipped one (demo), else the hub's or its local copy.
        random_weights: draw the weights where no file is given and none is shipped.

    Raises:
        RepaError: unknown name, a resolution without a whole grid, no weights, or another model's.
    """
    import torch

    facts = find_teacher(teacher) if isinstance(teacher, str) else teacher
    settings: dict[str, Any] = {
        "resolution": resolution,
        "device": torch.device(device),
        "compute_dtype": compute_dtype,
        "weights": weights,
        "random_weights": random_weights,
    }
    if isinstance(facts, OwnTeacher):
        from .own_encoder import OwnEncoder

        return OwnEncoder(facts, **settings)
    from .timm_teacher import TimmTeacher
    from .timm_vit import TimmEncoder

    assert isinstance(facts, TimmTeacher), "the registry lets nothing else in"
    return TimmEncoder(facts, **settings)
