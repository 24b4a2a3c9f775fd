"""The method that docs/extending/method.md prints: trained, resumed and sampled as it stands there."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from repa.commands.sample import SampleFlags, sample
from repa.commands.train import TrainFlags, train
from repa.data import outside
from repa.data.errors import RepaError
from repa.trainer.methods.outside import FLAG, origin_of
from repa.trainer.run.checked import ProblemsError
from repa.trainer.run.metrics import read_metrics
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Train = Callable[..., str]

PAGE = Path(__file__).parents[3] / "docs" / "extending" / "method.md"
NAME = "pooled:Pooled"
SMALL = ("preview_every=0", "log_every=1", "method.shift=0.1")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in with the printed module."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 40
    (tmp_path / "pooled.py").write_text(example, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(outside, "_imported", {})
    yield tmp_path
    sys.modules.pop("pooled", None)


@pytest.fixture
def run_train(place: Path, cache: Path, tiny: str) -> Train:
    def run(**options: Any) -> str:
        printed = io.StringIO()
        values = {"method": NAME, "model": tiny, "cache": str(cache), "max_steps": 2, "batch_size": 8}
        flags = TrainFlags(**{**values, "run": place / "run", "assignments": SMALL, **options})
        train(flags, console=Console(file=printed, width=300))
        return printed.getvalue()

    return run


class Pixels:
    name = "pixels"
    weights_sha256 = "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


def test_it_trains_resumes_and_samples(
    run_train: Train,
    place: Path,
    same_run: Callable[[Path, Path, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "demo/cls" in run_train(dry_run=True)
    assert not (place / "run").exists()
    run_train()
    resumed = run_train(max_steps=4)
    assert "resuming" in resumed
    assert "note" not in resumed
    run_train(max_steps=4, run=place / "whole", assignments=(*SMALL, "checkpoint_every=2"))
    same_run(place / "run", place / "whole", 4)
    rows = read_metrics(place / "run" / "metrics.csv")
    assert len(rows) == 4
    for row in rows:
        assert row["loss"] == pytest.approx(row["velocity"] + 0.5 * row["pooled"], rel=1e-6)
    settings = yaml.safe_load((place / "run" / "config.yaml").read_text())
    assert settings["method"] == {"name": NAME, "weight": 0.5, "shift": 0.1, "depth": None, "encoders": []}
    starts = json.loads((place / "run" / "run.json").read_text())["starts"]
    assert [start["method"] for start in starts] == [{"name": NAME, **origin_of(NAME)}] * 2
    assert starts[0]["method"]["file_sha256"]
    (place / "pooled.py").write_text((place / "pooled.py").read_text() + "# other\n")
    assert "note" in run_train(max_steps=5)
    # sampling needs nothing of the method
    (place / "pooled.py").unlink()
    monkeypatch.setattr(outside, "_imported", {})
    del sys.modules["pooled"]
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    sample(SampleFlags(run=place / "run", num=3, steps=2, npz=True, out=place / "out"))
    assert "pooled" not in sys.modules
    with np.load(place / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 4, 4, 3)


def test_a_run_of_others_imports_nothing(
    run_train: Train, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_train()
    monkeypatch.setattr(outside, "_imported", {})
    del sys.modules["pooled"]
    file = place / "run" / "config.yaml"
    for flags in (
        TrainFlags(run=place / "run"),
        TrainFlags(run=place / "run", dry_run=True),
        TrainFlags(run=place / "run", max_steps=4),
        TrainFlags(config=file, run=place / "new"),
    ):
        with pytest.raises(RepaError) as caught:
            train(flags, console=Console(file=io.StringIO()))
        assert caught.value.field == FLAG
        assert f"{FLAG} {NAME}" in caught.value.remedy
    assert "pooled" not in sys.modules
    assert not (place / "new").exists()
    train(TrainFlags(config=file, run=place / "new", method=NAME), console=Console(file=io.StringIO()))
    assert (place / "new" / "metrics.csv").read_bytes() == (place / "run" / "metrics.csv").read_bytes()


def test_what_it_needs_is_checked(run_train: Train) -> None:
    with pytest.raises(ProblemsError) as caught:
        run_train(assignments=(*SMALL, "method.depth=3", "method.encoders=[x]"))
    assert {problem.field for problem in caught.value.problems} == {"method.depth", "method.encoders"}
    for setting, value in (("weight", -1), ("shift", "nan"), ("depth", "deep"), ("shft", 1)):
        with pytest.raises(RepaError) as refused:
            run_train(assignments=(*SMALL, f"method.{setting}={value}"))
        assert refused.value.field == f"method.{setting}"
