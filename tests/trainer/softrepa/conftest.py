"""A captioned cache and runs of a few steps on small denoisers."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.testing import synthetic_cache, synthetic_captions
from repa.trainer.softrepa.fit import fit
from repa.trainer.softrepa.settings import SoftConfig, build
from rich.console import Console
from small_diffusion import save_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.run.fit import Outcome

CONDITIONS = {"sd15": "clip-l-text/states", "sdxl": "sdxl-text/states", "sd3": "sd3-text/states"}
TEXT = {
    "clip-l-text/states": ColumnSpec(shape=(7, 12), dtype="float16"),
    "sdxl-text/states": ColumnSpec(shape=(7, 12), dtype="float16"),
    "sdxl-text/pooled": ColumnSpec(shape=(10,), dtype="float16"),
    "sd3-text/states": ColumnSpec(shape=(7, 24), dtype="float16"),
    "sd3-text/pooled": ColumnSpec(shape=(20,), dtype="float16"),
    "sd3-context/states": ColumnSpec(shape=(7, 16), dtype="int8"),
    "sd3-context/states-scale": ColumnSpec(shape=(16,), dtype="float32"),
    "sd3-context/pooled": ColumnSpec(shape=(20,), dtype="float16"),
}


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows, one of them invalid, latents ``[4, 8, 8]``, up to three captions an image."""
    path = tmp_path_factory.mktemp("soft") / "cache"
    moments = {MOMENTS: ColumnSpec(shape=(8, 8, 8), dtype="float32")}
    synthetic_cache(path, num_rows=40, invalid={5: "damaged"}, columns=moments, resolution=64)
    synthetic_captions(path, columns=TEXT)
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small denoisers by kind."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, kind) for kind in CONDITIONS}


@pytest.fixture
def soft_settings(captioned: Path, models: dict[str, Path]) -> Callable[..., SoftConfig]:
    """Settings of a run of four steps on a kind of denoiser."""

    def make(kind: str = "sd15", **changes: Any) -> SoftConfig:
        values: dict[str, Any] = {
            "cache": str(captioned),
            "model": str(models[kind]),
            "condition": CONDITIONS[kind],
            "max_steps": 4,
            "batch_size": 4,
            "rows": 2,
            "holdout": 4,
            "eval_every": 2,
            "checkpoint_every": 2,
            "log_every": 1,
            "accelerator": "cpu",
        }
        if kind == "sd3":
            values["layers"] = 3
        return build({**values, **changes})

    return make


@pytest.fixture
def soft_fit(tmp_path: Path) -> Callable[..., tuple[Outcome, str]]:
    """Train in ``tmp_path / name``; the outcome and what was printed."""

    def run(config: SoftConfig, name: str = "run") -> tuple[Outcome, str]:
        printed = io.StringIO()
        outcome = fit(config, tmp_path / name, console=Console(file=printed, width=200))
        return outcome, printed.getvalue()

    return run
