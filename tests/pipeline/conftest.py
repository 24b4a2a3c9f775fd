"""Small pictures and the command on them, for every test of this folder."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from attention_forms import teacher_features, write_forms
from PIL import Image
from repa.commands.preprocess import PreprocessFlags, preprocess
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

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


def flags_for(data: Path, cache: Path, /, **changes: Any) -> PreprocessFlags:
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


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """See `draw_pictures`."""
    return draw_pictures(tmp_path / "pictures")


@pytest.fixture(scope="session")
def complete_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `command` makes of the pictures; copy it before changing it."""
    folder = tmp_path_factory.mktemp("complete")
    flags = flags_for(draw_pictures(folder / "pictures"), folder / "cache")
    preprocess(flags, console=Console(file=io.StringIO()))
    return folder / "cache"


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cache of the demo's images in each form of attention and tokens; copy it before changing it."""
    return write_forms(tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="session")
def teacher() -> dict[str, torch.Tensor]:
    """What the demo's teacher says of the images of `forms`, in float32."""
    return teacher_features()


@pytest.fixture
def command(pictures: Path, tmp_path: Path) -> Callable[..., str]:
    """`repa preprocess` by the demo's models on the pictures; returns what it printed."""

    def run(**changes: Any) -> str:
        output = io.StringIO()
        flags = flags_for(pictures, tmp_path / "cache", **changes)
        preprocess(flags, console=Console(file=output, width=200))
        return output.getvalue()

    return run
