"""Runs on SiT↓, whose middle blocks have the teacher's 2×2 tokens and whose outer ones have 4×4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repa.commands.sample import SampleFlags, sample
from repa.trainer.config import TrainConfig
from repa.trainer.models.sit_down import SiTDown
from repa.trainer.run.checks import check
from repa.trainer.run.metrics import read_metrics
from repa.trainer.sampling.generate import model_of_run
from repa.trainer.step.module import build_backbone

Settings = Callable[..., TrainConfig]


class Pixels:
    name = "pixels"
    weights_sha256 = "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


def test_repa_trains_resumes_previews_and_samples(
    settings: Settings,
    tiny_down: str,
    undisturbed: Callable[..., Path],
    killed_fit: Callable[..., None],
    run_fit: Callable[..., Any],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {
        "holdout": 8,
        "eval_every": 3,
        "gradient_angle_every": 3,
        "preview_every": 6,
        "preview_steps": 2,
    }
    config = settings(
        model=tiny_down,
        method__depth=2,
        lr=1e-2,
        ema_decay=0.5,
        max_steps=6,
        checkpoint_every=2,
        preview_steps=2,
        **options,
    )
    whole = undisturbed(config, decoder=Pixels())
    killed_fit(config, "killed", moment=5, decoder=Pixels())
    outcome, _ = run_fit(config, "killed", decoder=Pixels())
    assert (outcome.resumed_from, outcome.finished) == (4, True)
    same_run(whole, tmp_path / "killed", 6)
    rows = read_metrics(whole / "metrics.csv")
    assert {"velocity", "repa", "held_out_ema", "gradient_angle"} <= set().union(*rows)
    assert (whole / "samples" / "step-00000006.png").exists()

    model = model_of_run(whole)
    assert isinstance(model.backbone, SiTDown)
    monkeypatch.setattr("repa.commands.sample._decoder", lambda *_: Pixels())
    images = []
    for guidance in (1.0, 4.0):
        out = tmp_path / f"out-{guidance}"
        sample(SampleFlags(run=whole, num=3, steps=4, guidance=guidance, npz=True, out=out))
        with np.load(out / "samples.npz") as arrays:
            images.append(arrays["arr_0"].astype(int))
    assert images[0].shape == (3, 4, 4, 3)
    assert np.abs(images[0] - images[1]).max() > 0


def test_every_parameter_learns(settings: Settings, tiny_down: str, undisturbed: Callable[..., Path]) -> None:
    """Also both tables of labels, all of the skips, and what shrinks and grows the grid."""
    config = settings(model=tiny_down, method__depth=2, lr=1e-2, max_steps=6)
    trained = model_of_run(undisturbed(config), weights="model").backbone
    method = check(config).method
    first = build_backbone(trained.config, method, config.seed)
    pairs = zip(first.named_parameters(), trained.parameters(), strict=True)
    assert [name for (name, before), after in pairs if torch.equal(before, after)] == ["pos_embed"]


@pytest.mark.parametrize(("depth", "fits"), [(1, False), (2, True), (3, True), (4, False)])
def test_repa_is_checked_by_block(settings: Settings, tiny_down: str, depth: int, fits: bool) -> None:
    problems = check(settings(model=tiny_down, method__depth=depth)).problems
    assert [problem.field for problem in problems] == ([] if fits else ["demo/patch"])
    if not fits:
        assert "2-3" in problems[0].remedy


def test_haste_runs_in_the_middle_and_nowhere_else(
    haste: Settings, tiny_down: str, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    fitting = {"model": tiny_down, "method__depth": 3, "method__student_blocks": "2,3"}
    _, printed = run_fit(haste(**fitting, max_steps=3, method__stop=2))
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [{"repa", "attention"} <= set(row) for row in rows] == [True, True, False], printed
    (problem,) = check(haste(**{**fitting, "method__student_blocks": "1,2"})).problems
    assert problem.field == "demo/q"
    assert "2-3" in problem.remedy
