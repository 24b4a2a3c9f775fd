"""Runs of LightningDiT with a token for each position of latents of 32 channels, normalised by channel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_method import NOTES, small_config
from repa.commands.sample import SampleFlags, sample
from repa.data.errors import RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.testing import synthetic_cache
from repa.data.upkeep.latent_statistics import settle_latent_statistics
from repa.trainer.config import TrainConfig
from repa.trainer.methods import METHODS
from repa.trainer.models.lightningdit import LightningDiT
from repa.trainer.models.registry import choices_of
from repa.trainer.models.reversed_time import reverse_time
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.metrics import read_metrics
from repa.trainer.sampling.generate import model_of_run

Settings = Callable[..., TrainConfig]
MODEL = "LightningDiT-T/1"


class Pixels:
    name, weights_sha256 = "pixels", "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of latents ``[32, 4, 4]`` and of a teacher that has as many tokens."""
    attention = ColumnSpec(shape=(3, 2, 16, 8), dtype="float16")
    columns = {
        MOMENTS: ColumnSpec(shape=(64, 4, 4), dtype="float32"),
        "demo/patch": ColumnSpec(shape=(16, 12), dtype="float16"),
        "demo/cls": ColumnSpec(shape=(12,), dtype="float16"),
        "demo/q": attention,
        "demo/k": attention,
    }
    path = tmp_path_factory.mktemp("wide") / "cache"
    synthetic_cache(path, num_rows=24, columns=columns, notes=NOTES, resolution=64)
    settle_latent_statistics(path)
    return path


def test_it_trains_resumes_previews_and_samples(
    settings: Settings,
    wide: Path,
    undisturbed: Callable[..., Path],
    killed_fit: Callable[..., None],
    run_fit: Callable[..., Any],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(
        cache=str(wide),
        model=MODEL,
        latent_norm="channel",
        qk_norm=True,
        lr=1e-2,
        max_steps=6,
        checkpoint_every=2,
        holdout=8,
        eval_every=3,
        gradient_angle_every=3,
        preview_every=6,
        preview_steps=2,
    )
    whole = undisturbed(config, decoder=Pixels())
    killed_fit(config, "killed", moment=5, decoder=Pixels())
    with pytest.raises(RepaError) as caught:
        run_fit(settings(**{**vars_of(config), "rope": False}), "killed")
    assert caught.value.field == "rope"
    outcome, _ = run_fit(config, "killed", decoder=Pixels())
    assert (outcome.resumed_from, outcome.finished) == (4, True)
    same_run(whole, tmp_path / "killed", 6)
    rows = read_metrics(whole / "metrics.csv")
    assert {"velocity", "repa", "held_out_ema", "gradient_angle"} <= set().union(*rows)
    assert (whole / "samples" / "step-00000006.png").exists()

    model = model_of_run(whole)
    assert isinstance(model.backbone, LightningDiT)
    assert all(choices_of(model.backbone.config).values())
    assert len(model.scale.mean) == 32
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    sample(SampleFlags(run=whole, num=3, steps=4, guidance=2.0, npz=True, out=tmp_path / "out"))
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 4, 4, 3)


def vars_of(config: TrainConfig) -> dict[str, Any]:
    """Settings that `settings` makes an equal configuration of."""
    names = ("cache", "model", "latent_norm", "qk_norm", "lr", "max_steps", "checkpoint_every", "holdout")
    names += ("eval_every", "gradient_angle_every", "preview_every", "preview_steps")
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_on_it(
    method: str, wide: Path, run_fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=4, width=24, heads=2))
    run_fit(small_config(method, wide, model=MODEL, max_steps=2, holdout=0, latent_norm="channel"))
    first, last = read_metrics(tmp_path / "run" / "metrics.csv")
    assert first["loss"] != last["loss"]


def test_it_goes_on_from_published_weights(
    settings: Settings, wide: Path, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    """Those of another time: the first velocity loss is that of the weights before they were turned."""
    new = {"cache": str(wide), "model": MODEL, "latent_norm": "channel", "lr": 1e-2, "method": "none"}
    run_fit(settings(**new, max_steps=6), "first")
    trained = model_of_run(tmp_path / "first", weights="model").backbone
    published = {"ema": reverse_time(trained.state_dict())}
    torch.save(published, tmp_path / "published.pt")
    losses = []
    for name, init in (
        ("drawn", ""),
        ("own", str(tmp_path / "first")),
        ("theirs", str(tmp_path / "published.pt")),
    ):
        run_fit(settings(**new, max_steps=1, init=init, seed=3), name)
        losses.append(read_metrics(tmp_path / name / "metrics.csv")[0]["velocity"])
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
