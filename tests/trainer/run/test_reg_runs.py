"""REG as a run: the draws of the baseline, killed and resumed, the end of alignment, samples of the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repa.commands.sample import SampleFlags, sample
from repa.data.errors import RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.testing import SYNTHETIC_COLUMNS, expected_row, synthetic_cache
from repa.trainer.config import TrainConfig
from repa.trainer.methods.base import MethodConfig
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checks import check
from repa.trainer.run.identity import identity_of
from repa.trainer.run.lightning_trainer import make_trainer
from repa.trainer.run.metrics import read_metrics
from repa.trainer.sampling.generate import model_of_file, model_of_run, newest_checkpoint
from repa.trainer.step.checkpoints import load_checkpoint
from repa.trainer.step.draws import StepDraws
from safetensors.torch import load_file

Settings = Callable[..., TrainConfig]

REG = {"method": "reg", "method__depth": 1, "method__projector_width": 16}


class Pixels:
    name = "pixels"
    weights_sha256 = "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def trained(settings: Settings, undisturbed: Callable[..., Path]) -> tuple[TrainConfig, Path]:
    config = settings(
        **REG,
        max_steps=8,
        lr=1e-2,
        ema_decay=0.5,
        checkpoint_every=2,
        holdout=8,
        eval_every=4,
        gradient_angle_every=3,
        preview_every=8,
        preview_steps=2,
        method__stop=5,
    )
    return config, undisturbed(config, decoder=Pixels())


def test_terms_before_and_after_the_end_of_alignment(trained: tuple[TrainConfig, Path]) -> None:
    rows = read_metrics(trained[1] / "metrics.csv")
    for row in rows:
        aligned = row["step"] <= 5
        assert ("repa" in row) == aligned
        assert row["cls_velocity_weight"] == 0.03
        expected = row["velocity"] + 0.03 * row["cls_velocity"] + (0.5 * row["repa"] if aligned else 0)
        assert row["loss"] == pytest.approx(expected, rel=1e-6)
    last = rows[-1]
    held_out = {"held_out", "held_out_ema", "held_out_cls", "held_out_ema_cls"}
    assert held_out <= last.keys()
    assert len({last[name] for name in held_out}) == 4
    assert "gradient_angle" in rows[2]
    assert (trained[1] / "samples" / "step-00000008.png").exists()


@pytest.mark.parametrize("moment", [4, 6])
def test_a_killed_run_goes_on_to_the_bit(
    trained: tuple[TrainConfig, Path],
    moment: int,
    killed_fit: Callable[..., None],
    run_fit: Callable[..., Any],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
) -> None:
    config, whole = trained
    killed_fit(config, "killed", moment=moment, decoder=Pixels())
    outcome, _ = run_fit(config, "killed", decoder=Pixels())
    assert outcome.resumed_from in (2, 4)
    same_run(whole, tmp_path / "killed", 8)


def test_held_out_loss_of_the_latent_has_the_draws_of_the_baseline(
    settings: Settings, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    """At step 1 the networks' outputs are nearly zero, so that both losses are that of the same noise."""
    found = []
    for name in ("none", "reg"):
        changes = REG if name == "reg" else {"method": "none"}
        run_fit(settings(**changes, max_steps=1, lr=1e-9, holdout=8, eval_every=1), name)
        found.append(read_metrics(tmp_path / name / "metrics.csv")[0])
    for key in ("velocity", "held_out", "held_out_ema"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-6)


def test_a_standardised_class_token(
    settings: Settings,
    cache: Path,
    run_fit: Callable[..., Any],
    killed_fit: Callable[..., None],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
) -> None:
    """By hand over the rows that are trained on; the target of the alignment is the token as stored."""
    config = settings(**REG, method__standardise=True, holdout=8, eval_every=2, checkpoint_every=2)
    checked = check(config)
    assert checked.problems == []
    module, data = assemble(config, checked, identity_of(checked, config))
    assert checked.train_rows is not None
    rows = checked.train_rows
    spec = SYNTHETIC_COLUMNS["demo/cls"]
    tokens = np.stack([expected_row("demo/cls", int(row), spec) for row in rows]).astype(np.float64)
    data.trainer = make_trainer(config)
    batch = next(iter(data.train_dataloader()))
    data.teardown("fit")
    draws = StepDraws(seed=config.seed, rank=0, device=torch.device("cpu")).of_step(
        0, 8, (4, 4, 4), module.objective.times, module.backbone.y_embedder, {"cls": 16}
    )
    stored = batch.columns["demo/cls"].numpy().astype(np.float64)
    expected = (stored - tokens.mean(0)) / tokens.std(0)
    target = draws.beside["cls"].numpy() - expected  # the network's first output is zero
    value = module.terms(batch)["cls_velocity"].value.item()
    assert value == pytest.approx((target**2).mean(), rel=1e-5)
    found = module.method.target_of(batch.columns, "demo/patch")[:, 0]
    assert torch.equal(found, batch.columns["demo/cls"].to(found.dtype))

    run_fit(config, "whole")
    killed_fit(config, "killed", moment=3)
    run_fit(config, "killed")
    same_run(tmp_path / "whole", tmp_path / "killed", 4)
    saved = load_checkpoint(newest_checkpoint(tmp_path / "whole"))["state_dict"]
    assert saved["beside.cls_mean"].numpy() == pytest.approx(tokens.mean(0), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_it_is_sampled(
    trained: tuple[TrainConfig, Path], solver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    images = {}
    for name, guidance, guidance_cls, batch in (
        ("plain", 1.0, None, 2),
        ("both", 4.0, None, 3),
        ("same", 4.0, 4.0, 3),
        ("apart", 4.0, 1.0, 3),
    ):
        flags = SampleFlags(
            run=trained[1],
            num=3,
            steps=4,
            solver=solver,
            guidance=guidance,
            guidance_cls=guidance_cls,
            batch_size=batch,
            npz=True,
            out=tmp_path / name,
        )
        sample(flags)
        record = json.loads((tmp_path / name / "sampling.json").read_text())
        expected = guidance if guidance_cls is None else guidance_cls
        assert (record["guidance"], record["guidance_cls"]) == (guidance, expected)
        with np.load(tmp_path / name / "samples.npz") as arrays:
            images[name] = arrays["arr_0"]
    assert np.array_equal(images["both"], images["same"])
    assert not np.array_equal(images["both"], images["plain"])
    model = model_of_run(trained[1])
    assert model.backbone.config.token_widths == (16,)


def test_another_guidance_of_the_class_token_is_another_sampling(
    trained: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    values: dict[str, Any] = {"run": trained[1], "num": 1, "steps": 1, "out": tmp_path / "out"}
    sample(SampleFlags(**values, guidance=2.0))
    with pytest.raises(RepaError) as caught:
        sample(SampleFlags(**values, guidance=2.0, guidance_cls=1.0))
    assert caught.value.field == "--out"
    with pytest.raises(RepaError) as caught:
        sample(SampleFlags(**values, guidance_cls=-1.0))
    assert caught.value.field == "--guidance-cls"


def test_without_a_class_token_there_is_nothing_to_guide(
    settings: Settings, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    plain = undisturbed(settings(method="none", max_steps=1))
    with pytest.raises(RepaError) as caught:
        sample(SampleFlags(run=plain, guidance_cls=1.0, out=tmp_path / "out"))
    assert caught.value.field == "--guidance-cls"
    assert not (tmp_path / "out").exists()


def test_a_cache_without_class_tokens(settings: Settings, tmp_path: Path) -> None:
    columns = {name: spec for name, spec in SYNTHETIC_COLUMNS.items() if name != "demo/cls"}
    synthetic_cache(tmp_path / "cache", num_rows=16, columns=columns)
    (problem,) = check(settings(**REG, cache=str(tmp_path / "cache"))).problems
    assert problem.field == "method.encoders"
    assert "repa preprocess" in problem.remedy


def test_a_u_shaped_network_refuses(settings: Settings) -> None:
    problems = check(settings(**REG, model="SiT-down-B/2")).problems
    assert "--model" in {problem.field for problem in problems}


def test_published_reg_is_sampled(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=4, width=48, heads=4))
    file = shared / "golden" / "reg.safetensors"
    assert model_of_file(file).backbone.config.token_widths == (24,)
    out = tmp_path / "out"
    flags: dict[str, Any] = {"checkpoint": file, "num": 2, "steps": 3, "solver": "sde", "guidance": 2.3}
    sample(SampleFlags(**flags, interval=(0.0, 0.85), npz=True, out=out))
    record = json.loads((out / "sampling.json").read_text())
    assert (record["guidance"], record["guidance_cls"], record["finished"]) == (2.3, 2.3, True)


def test_a_run_begins_with_published_weights(
    shared: Path,
    settings: Settings,
    run_fit: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=4, width=48, heads=4))
    columns = {
        MOMENTS: ColumnSpec(shape=(8, 16, 16), dtype="float32"),
        "demo/patch": ColumnSpec(shape=(64, 24), dtype="float16"),
        "demo/cls": ColumnSpec(shape=(24,), dtype="float16"),
    }
    synthetic_cache(tmp_path / "cache", num_rows=8, columns=columns, num_classes=10, resolution=128)
    file = shared / "golden" / "reg.safetensors"
    config = settings(**REG, cache=str(tmp_path / "cache"), init=str(file), max_steps=1, lr=1e-9)
    run_fit(config, "run")
    found, published = model_of_run(tmp_path / "run").backbone.state_dict(), load_file(file)
    for name, value in found.items():
        torch.testing.assert_close(value, published[name].float(), rtol=0, atol=1e-7)
    # what the method adds to the network is named by its flag
    with pytest.raises(RepaError) as caught:
        run_fit(replace(config, method_name="none", method=MethodConfig()), "other")
    assert caught.value.field == "--init"
    assert "--method" in caught.value.remedy
