"""`repa train --method haste`: the plan of both phases, what is missing, a run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from repa.commands.train import TrainFlags, train
from repa.data.format.columns import ColumnSpec
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.checked import ProblemsError
from repa.trainer.run.metrics import read_metrics
from rich.console import Console

SMALL = (
    "method.depth=1",
    "method.student_blocks=2",
    "method.teacher_blocks=3",
    "method.stop=3",
    "method.projector_width=16",
    "preview_every=0",
    "log_every=1",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, and a network of two blocks with three heads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=3))
    return tmp_path


@pytest.fixture
def run_train() -> Callable[..., str]:
    def run(**options: Any) -> str:
        printed = io.StringIO()
        values = {
            "method": "haste",
            "model": "SiT-T/2",
            "cache": "cache",
            "max_steps": 5,
            "batch_size": 8,
            "assignments": SMALL,
        }
        train(TrainFlags(**{**values, **options}), console=Console(file=printed, width=300))
        return printed.getvalue()

    return run


def write_cache(path: Path, dtype: str = "float16") -> None:
    spec = ColumnSpec(shape=(3, 2, 4, 8), dtype=dtype)
    synthetic_cache(path, num_rows=24, columns={**SYNTHETIC_COLUMNS, "demo/q": spec, "demo/k": spec})


def test_dry_run_shows_both_phases_and_their_bytes(here: Path, run_train: Callable[..., str]) -> None:
    write_cache(here / "cache")
    printed = run_train(dry_run=True, max_steps=100)
    for part in ("name: haste", "attention_weight: 0.5", "student_blocks:", "stop: 3"):
        assert part in printed, part
    lines = [line for line in printed.splitlines() if "│" in line]
    align, plain = (next(line for line in lines if f" {name} " in line) for name in ("align", "plain"))
    # a row: latents 128 floats, tokens 64 and queries and keys 192 halves each; eight rows a step
    aligned, latents = 8 * (4 * 128 + 2 * (64 + 192 + 192)), 8 * 4 * 128
    assert "0–2" in align
    assert f"{aligned / 1000:.3g} kB" in align
    assert f"{3 * aligned / 1000:.3g} kB" in align
    assert "3–99" in plain
    assert f"{latents / 1000:.3g} kB" in plain
    assert f"{97 * latents / 1000:.3g} kB" in plain
    assert [name for name in ("demo/patch", "demo/q", "demo/k") if name in printed] == [
        "demo/patch",
        "demo/q",
        "demo/k",
    ]


def test_dry_run_without_attention_says_how_to_add_it(
    here: Path, run_train: Callable[..., str], capsys: Any
) -> None:
    synthetic_cache(here / "cache", num_rows=24)
    with pytest.raises(ProblemsError, match="no attention targets of demo") as caught:
        run_train(dry_run=True)
    assert "repa preprocess --encoder demo --attention 3" in str(caught.value)
    with pytest.raises(ProblemsError, match="no attention targets"):
        run_train()
    assert not (here / "runs").exists()


def test_a_run_over_tau(here: Path, run_train: Callable[..., str]) -> None:
    write_cache(here / "cache", "float32")
    printed = run_train()
    rows = read_metrics(here / "runs" / "haste-SiT-T-2" / "metrics.csv")
    assert ["attention" in row for row in rows] == [True, True, True, False, False]
    assert "repa sample --run runs/haste-SiT-T-2" in printed
