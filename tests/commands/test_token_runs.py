"""Tokens of the demo's teacher from images to samples: preprocess, train, sample, evaluate, analyze."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from repa.commands.analyze.flags import DOCUMENT, AnalyzeFlags
from repa.commands.analyze.run import analyze
from repa.commands.evaluate.command import evaluate
from repa.commands.evaluate.flags import EvaluateFlags
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.commands.sample import SampleFlags, sample
from repa.commands.train import TrainFlags, train
from repa.data.errors import RepaError
from repa.pipeline.demo import TEACHER_WEIGHTS
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.metrics import read_metrics
from repa.trainer.sampling.generate import newest_checkpoint
from repa.trainer.step.checkpoints import CHECKPOINT_KEY, load_checkpoint
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_rae import save_rae_of_demo

pytest.importorskip("transformers")

SETTINGS = (
    "latents=demo/patch",
    "preview_every=4",
    "preview_count=2",
    "preview_steps=2",
    "checkpoint_every=2",
    "label_dropout=0.1",
    "objective.shift=0.5",
)


def console() -> Console:
    return Console(file=io.StringIO(), width=300)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=3))
        yield


@pytest.fixture(scope="module")
def rae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "rae"
    save_rae_of_demo(folder)
    return folder


@pytest.fixture(scope="module")
def cache(rae: Path) -> Path:
    path = rae.parent / "cache"
    flags: dict[str, Any] = {"data": "demo", "cache": path, "limit": 24, "encoders": ["demo"], "vae": "demo"}
    preprocess(PreprocessFlags(**flags, resolution=64, batch_size=8, shard_rows=8), console=console())
    return path


def train_flags(cache: Path, run: Path, *assignments: str, **flags: Any) -> TrainFlags:
    values: dict[str, Any] = {"method": "none", "model": "SiT-T/1", "batch_size": 8, "max_steps": 4, **flags}
    return TrainFlags(cache=str(cache), run=run, assignments=[*SETTINGS, *assignments], **values)


@pytest.fixture(scope="module")
def run(cache: Path, rae: Path) -> Path:
    folder = rae.parent / "run"
    measured = ("evaluate_every=4", "evaluate_num=16", "evaluate_steps=1", "holdout=8", "eval_every=2")
    train(train_flags(cache, folder, f"decoder={rae}", *measured), console=console())
    return folder


def test_previews_and_evaluations_are_decoded(run: Path) -> None:
    grid = np.asarray(Image.open(run / "samples" / "step-00000004.png"))
    assert grid.shape[-1] == 3
    assert grid.shape[1] >= 2 * 64
    last = read_metrics(run / "metrics.csv")[-1]
    assert any(name.startswith("fd/demo") and value > 0 for name, value in last.items())
    assert np.isfinite(last["held_out_ema"])
    said = load_checkpoint(newest_checkpoint(run))[CHECKPOINT_KEY]
    assert said["tokens"]["grid"] == (8, 8)
    assert said["tokens"]["width"] == 128


def test_samples_are_decoded_by_the_runs_decoder_and_do_not_depend_on_the_batch(
    run: Path, rae: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"run": run, "num": 3, "steps": 2, "shift": 0.5}
    sample(SampleFlags(**flags, out=tmp_path / "a", batch_size=2), console=console())
    sample(SampleFlags(**flags, out=tmp_path / "b", batch_size=3, npz=True), console=console())
    images = np.stack([np.asarray(Image.open(tmp_path / "a" / f"{i:06d}.png")) for i in range(3)])
    assert images.shape == (3, 64, 64, 3)
    assert images.std() > 1
    apart = np.load(tmp_path / "b" / "samples.npz")["arr_0"].astype(int) - images
    assert np.abs(apart).max() <= 1
    record = json.loads((tmp_path / "a" / "sampling.json").read_text())
    assert record["autoencoder"] == str(rae)
    assert len(record["autoencoder_sha256"]) == 64


def test_with_the_teachers_own_file_they_are_the_same(run: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"run": run, "num": 1, "steps": 2}
    sample(SampleFlags(**flags, out=tmp_path / "a"), console=console())
    sample(SampleFlags(**flags, out=tmp_path / "b", teacher_weights=TEACHER_WEIGHTS), console=console())
    one, two = (np.asarray(Image.open(tmp_path / name / "000000.png")) for name in "ab")
    assert (one == two).all()
    other = load_file(TEACHER_WEIGHTS)
    other["norm.weight"] = other["norm.weight"] * 2
    save_file(other, tmp_path / "other.safetensors")
    wrong = SampleFlags(**flags, out=tmp_path / "c", teacher_weights=tmp_path / "other.safetensors")
    with pytest.raises(RepaError) as caught:
        sample(wrong, console=console())
    assert caught.value.field == "--teacher-weights"
    assert not (tmp_path / "c").exists()


def test_a_run_without_a_decoder_trains_and_is_sampled_with_one(
    cache: Path, rae: Path, tmp_path: Path
) -> None:
    said = console()
    train(train_flags(cache, tmp_path / "run", max_steps=1), console=said)
    assert "no previews" in said.file.getvalue()  # type: ignore[attr-defined]
    assert not (tmp_path / "run" / "samples").exists()
    flags: dict[str, Any] = {"run": tmp_path / "run", "num": 1, "steps": 1, "out": tmp_path / "out"}
    for vae in (None, "demo", str(tmp_path)):
        with pytest.raises(RepaError) as caught:
            sample(SampleFlags(**flags, vae=vae), console=console())
        assert caught.value.field == "--vae"
    save_rae_of_demo(tmp_path / "grid")
    config = json.loads((tmp_path / "grid" / "config.json").read_text())
    config |= {"encoder_input_size": 32, "image_size": None}
    (tmp_path / "grid" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RepaError) as caught:
        sample(SampleFlags(**flags, vae=str(tmp_path / "grid")), console=console())
    assert caught.value.field == "--vae"
    sample(SampleFlags(**flags, vae=str(rae)), console=console())
    assert (tmp_path / "out" / "000000.png").exists()


def test_a_decoder_that_cannot_be_had_is_said_before_the_first_step(cache: Path, tmp_path: Path) -> None:
    named = f"decoder={tmp_path / 'none'}"
    with pytest.raises(RepaError) as caught:
        train(train_flags(cache, tmp_path / "run", named, "preview_every=1", max_steps=1), console=console())
    assert caught.value.field == "decoder"
    assert not (tmp_path / "run").exists()
    train(train_flags(cache, tmp_path / "run", named, "preview_every=0", max_steps=1), console=console())
    assert newest_checkpoint(tmp_path / "run").exists()


def test_its_samples_are_measured_and_its_blocks_looked_into(run: Path, tmp_path: Path) -> None:
    evaluate(EvaluateFlags(run=run, num=16, steps=1, metrics="fd", out=tmp_path / "eval"), console=console())
    assert "fd" in "".join(file.read_text() for file in (tmp_path / "eval").rglob("*.json"))
    analyze(AnalyzeFlags(run=run, num=12, k=2, out=tmp_path / "blocks"), console=console())
    document = json.loads((tmp_path / "blocks" / DOCUMENT).read_text())
    assert all(np.isfinite(each["norm"]) for blocks in document["times"].values() for each in blocks.values())


def test_latents_refuse_a_teachers_weights(cache: Path, tmp_path: Path) -> None:
    flags = TrainFlags(
        cache=str(cache),
        run=tmp_path / "run",
        method="none",
        model="SiT-T/2",
        batch_size=8,
        max_steps=1,
        assignments=["preview_every=0"],
    )
    train(flags, console=console())
    with pytest.raises(RepaError) as caught:
        sample(
            SampleFlags(run=tmp_path / "run", num=1, steps=1, teacher_weights=TEACHER_WEIGHTS),
            console=console(),
        )
    assert caught.value.field == "--teacher-weights"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
