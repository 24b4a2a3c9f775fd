"""Small pictures, and the command that encodes them by the demo's models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from repa.commands.preprocess import PreprocessFlags

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 16
CLASSES, EACH = 3, 4


def draw_pictures(folder: Path) -> Path:
    """Twelve PNG files of 16×16 noise in three class folders."""
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(EACH):
            pixels = generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    return folder


def flags_for(data: Path, cache: Path | str, /, **changes: Any) -> PreprocessFlags:
    """`repa preprocess` by the demo's models, an image a batch and four a shard."""
    flags: dict[str, Any] = {
        "data": str(data),
        "cache": cache,
        "encoders": ["demo"],
        "vae": "demo",
        "resolution": SIDE,
        "batch_size": 1,
        "shard_rows": 4,
    }
    return PreprocessFlags(**{**flags, **changes})
