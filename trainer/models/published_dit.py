"""Published checkpoints of DiT and DiT-SRA."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .dit import DiT, DiTConfig
from .published import OtherFamilyError, PublishedCheckpoint, check_family, read_plain
from .published_file import KNOWN, read_published

if TYPE_CHECKING:
    from pathlib import Path


def load_dit(
    path: Path, *, weights: str = "ema", certain: bool = False, heads: int | None = None
) -> PublishedCheckpoint:
    """Read a published checkpoint of a DiT.

    Args:
        path: ``.safetensors``, or any other name for a file of `torch.save`.
        weights: which of the two sets of a nested file, ``ema`` or ``model``.
        certain: whether somebody says that it is a DiT's, which the file need not say.
        heads: attention heads of a size that is not in `SIT_SIZES`; known sizes need none.

    Raises:
        RepaError: unreadable, no checkpoint of a DiT, keys missing or too many, or a size of unknown heads.
    """
    file = read_published(path, weights=weights)
    if not file.is_doubled:
        raise OtherFamilyError(
            f"{path} predicts no two channels for each of its latents, as a DiT",
            f"give one of {KNOWN}",
            field="--ckpt",
        )
    published = read_plain(file, DiTConfig, DiT, heads)
    check_family(file, "DiT", certain=certain)
    return replace(published, objective={})
