"""Runs of SiT with rotary positions, RMSNorm and gated MLP: trained, resumed, refused otherwise, sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer import compiling
from repa.trainer.config import TrainConfig
from repa.trainer.methods.haste import Haste
from repa.trainer.models.registry import choices_of
from repa.trainer.run.checks import check
from repa.trainer.run.metrics import read_metrics
from repa.trainer.sampling.generate import model_of_run

Settings = Callable[..., TrainConfig]
OPTIONS = {"qk_norm": True, "rope": True, "rms_norm": True, "swiglu": True}


def test_they_train_and_resume_and_are_of_the_run(
    settings: Settings,
    undisturbed: Callable[..., Path],
    killed_fit: Callable[..., None],
    run_fit: Callable[..., Any],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
) -> None:
    config = settings(**OPTIONS, max_steps=6, checkpoint_every=2, lr=1e-2)
    whole = undisturbed(config)
    killed_fit(config, "killed", moment=5)
    for name in OPTIONS:
        with pytest.raises(RepaError) as caught:
            run_fit(replace(config, **{name: False}), "killed")
        assert caught.value.field == name
    outcome, _ = run_fit(config, "killed")
    assert (outcome.resumed_from, outcome.finished) == (4, True)
    same_run(whole, tmp_path / "killed", 6)
    backbone = model_of_run(whole).backbone
    assert choices_of(backbone.config) == OPTIONS
    assert backbone.rotation is not None


def test_rotary_positions_change_the_run_and_nothing_else(
    settings: Settings, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    """The first weights are alike, and adaLN is zero, so what differs first is the second step."""
    for name, changes in (("plain", {}), ("turned", {"rope": True})):
        run_fit(settings(**changes, max_steps=3, lr=1e-2), name)
    plain, turned = (read_metrics(tmp_path / name / "metrics.csv") for name in ("plain", "turned"))
    assert plain[0]["velocity"] == turned[0]["velocity"]
    assert plain[2]["velocity"] != turned[2]["velocity"]


@pytest.mark.parametrize("method", ["haste", "reg", "sra"])
def test_other_methods_on_it(haste: Settings, settings: Settings, method: str) -> None:
    config = haste(**OPTIONS) if method == "haste" else settings(method=method, **OPTIONS)
    checked = check(config)
    assert checked.backbone is not None
    assert choices_of(checked.backbone) == OPTIONS
    if method == "haste":
        assert checked.problems == []
        assert isinstance(checked.method, Haste)


def test_compiled(
    settings: Settings, run_fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    for name, how in (("plain", "off"), ("compiled", "whole")):
        run_fit(settings(**OPTIONS, max_steps=2, lr=1e-2, compile=how), name)
    plain, compiled = (read_metrics(tmp_path / name / "metrics.csv") for name in ("plain", "compiled"))
    assert [row["velocity"] for row in compiled] == pytest.approx(
        [row["velocity"] for row in plain], rel=1e-5
    )
