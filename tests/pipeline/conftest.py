"""Small pictures and the command on them, for every test of this folder."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from attention_forms import teacher_features, write_forms
from demo_pictures import draw_pictures, flags_for
from repa.commands.preprocess import preprocess
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch


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
