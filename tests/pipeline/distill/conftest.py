"""A cache of the demo's images and its teacher, and a distillation from it."""

from __future__ import annotations

import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.pipeline.distill.config import DistillConfig
from repa.pipeline.distill.run import distill
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from repa.pipeline.encoders.distilled import Distilled


class Silent:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Any]:
        yield lambda count: None


def encode(cache: Path, **changes: Any) -> None:
    flags = {"data": "demo", "limit": 40, "batch_size": 8, "shard_rows": 16, "views": "flip", **changes}
    preprocess(PreprocessFlags(cache=cache, **flags), console=Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("distil") / "cache"
    encode(cache)
    return cache


@pytest.fixture
def distil(demo_cache: Path, tmp_path: Path) -> Callable[..., tuple[Path, Distilled]]:
    """Distil from the demo's cache with settings of a test."""

    def run(**changes: Any) -> tuple[Path, Distilled]:
        settings: dict[str, Any] = {
            "cache": str(demo_cache),
            "teacher": None,
            "idle": 0.75,
            "norm": "layer",
            "data": "demo",
            "may_import": False,
            "weights": None,
            "fit_images": 24,
            "steps": 0,
            "batch_size": 4,
            "learning_rate": 1e-4,
            "held_out": 8,
            "seed": 0,
            "save_every": 100,
            "out": tmp_path / "copy.safetensors",
            "device": "cpu",
        }
        return distill(DistillConfig(**{**settings, **changes}), Silent())

    return run
