"""`repa bank` and samples of GMem: whose vectors, mixtures, refusals, and what figures say of themselves."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from repa.cli import main, run_command
from repa.commands.bank.build import build as build_bank
from repa.commands.evaluate.command import evaluate
from repa.commands.evaluate.flags import EvaluateFlags
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.commands.sample import SampleFlags, sample
from repa.data.errors import RepaError
from repa.trainer.config import build
from repa.trainer.evaluation.results import read_evaluations
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.reports.page import compare_runs
from repa.trainer.run.fit import fit
from repa.trainer.run.metrics import read_metrics
from repa.trainer.sampling.bank import open_cache_bank
from repa.trainer.step.checkpoints import checkpoints_of
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BROKEN = 3
ROWS = 14


class Pixels:
    name = "pixels"
    weights_sha256 = "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of 14 images, one of them broken, by the demo's teacher, and two runs of two steps."""
    root = tmp_path_factory.mktemp("bank")
    (root / "images" / "a").mkdir(parents=True)
    for number in range(ROWS):
        values = np.random.default_rng(number).integers(256, size=(70, 90, 3), dtype=np.uint8)
        Image.fromarray(values).save(root / "images" / "a" / f"{number:02}.png")
    (root / "images" / "a" / f"{BROKEN:02}.png").write_bytes(b"no image")
    cache = PreprocessFlags(
        data=str(root / "images"), cache=root / "cache", encoders=["demo"], vae="demo", resolution=64
    )
    preprocess(cache, console=quiet())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=3))
        for name, method in (("run", "gmem"), ("dropping", "gmem"), ("classes", "none")):
            values = {
                "cache": str(root / "cache"),
                "model": "SiT-T/1",
                "method": method,
                "max_steps": 2,
                "batch_size": 4,
                "lr": 1e-2,
                "ema_decay": 0.5,
                "log_every": 1,
                "preview_every": 2 if name == "run" else 0,
                "preview_count": 2,
                "preview_steps": 1,
                "holdout": 2,
                "eval_every": 2,
            }
            if method == "gmem":
                values |= {"method.projector_width": 8, "method.depth": 1}
            if name == "dropping":
                values |= {"method.drop": 0.1, "method.preset": "first-version"}
            fit(build(flags=values), root / name, console=quiet(), decoder=Pixels())
        yield root
    torch.set_num_threads(before)


@pytest.fixture
def sampled(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Conditions and record of a sampling, and what was printed."""
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    made = [0]

    def run(**options: Any) -> tuple[torch.Tensor, dict[str, Any], str]:
        made[0] += 1
        printed, out = io.StringIO(), tmp_path / f"samples-{made[0]}"
        if "checkpoint" not in options:
            options.setdefault("run", folder / "run")
        flags = SampleFlags(**{"num": 4, "steps": 2, "npz": True, "out": out, **options})
        sample(flags, console=Console(file=printed, width=300))
        with np.load(out / "samples.npz") as arrays:
            condition = torch.from_numpy(arrays["arr_1"])
            assert arrays["arr_0"].shape == (flags.num, 8, 8, 3)
        return condition, json.loads((out / "sampling.json").read_text()), printed.getvalue()

    return run


def units(folder: Path, rows: list[int]) -> torch.Tensor:
    """The cache's class tokens of some rows, at unit length."""
    bank = open_cache_bank(folder / "cache", "demo/cls")
    found = bank.vectors(torch.tensor([bank.position_of(row) for row in rows]))
    return found / found.norm(dim=1, keepdim=True)


def test_without_flags_rows_of_the_runs_cache_are_drawn(folder: Path, sampled: Callable[..., Any]) -> None:
    condition, record, _ = sampled(num=30)
    every = units(folder, [row for row in range(ROWS) if row != BROKEN])
    distances = (condition[:, None] - every).norm(dim=2)
    assert distances.min(dim=1).values.max() < 1e-6
    assert len(set(distances.argmin(dim=1).tolist())) > 5
    again, same, _ = sampled(num=30)
    other, differing, _ = sampled(num=30, seed=1)
    assert torch.equal(condition, again)
    assert not torch.equal(condition, other)
    assert record == same
    assert record["condition_sha256"] != differing["condition_sha256"]
    assert record["bank"] == open_cache_bank(folder / "cache", "demo/cls").said.digest


def test_previews_and_held_out_losses_need_no_bank_of_their_own(folder: Path) -> None:
    assert (folder / "run" / "samples" / "step-00000002.png").exists()
    assert {"held_out", "held_out_ema"} <= read_metrics(folder / "run" / "metrics.csv")[-1].keys()


def test_rows_and_images_are_taken_in_turn(folder: Path, sampled: Callable[..., Any]) -> None:
    """An image goes through what the cache's went through, so that it is its row again."""
    image = str(folder / "images" / "a" / "09.png")
    condition, record, _ = sampled(like=["9", image, "0"], num=5)
    torch.testing.assert_close(condition[[0, 2, 3]], units(folder, [9, 0, 9]), rtol=0, atol=1e-6)
    # the teacher computes one image at a time, and the cache in batches
    torch.testing.assert_close(condition[1], condition[0], rtol=0, atol=2e-3)
    assert (condition[1] - condition[2]).norm() > 0.1
    assert record["vectors"] == f"like 9, {image}, 0"


def test_rows_by_the_noise(folder: Path, sampled: Callable[..., Any]) -> None:
    condition, _, _ = sampled(draw="noise", num=30)
    every = units(folder, [row for row in range(ROWS) if row != BROKEN])
    assert (condition[:, None] - every).norm(dim=2).min(dim=1).values.max() < 1e-6
    drawn, _, _ = sampled(num=30)
    assert not torch.equal(condition, drawn)
    # the row depends on seed and number of the sample alone
    fewer, _, _ = sampled(draw="noise", num=7)
    assert torch.equal(fewer, condition[:7])


@pytest.mark.parametrize("kind", ["linear", "spherical", "concat", "mask"])
def test_mixtures_go_from_the_first_to_the_second(
    folder: Path, sampled: Callable[..., Any], kind: str
) -> None:
    condition, record, _ = sampled(like=["1", "8"], mix=kind, alphas=[0.0, 0.5, 1.0], num=4)
    ends = units(folder, [1, 8])
    torch.testing.assert_close(condition[[0, 2]], ends, rtol=0, atol=1e-6)
    assert torch.equal(condition[3], condition[0])
    assert min((condition[1] - each).norm() for each in ends) > 0.05
    torch.testing.assert_close(condition.norm(dim=1), torch.ones(4))
    assert kind in record["vectors"]


def test_a_file_of_a_bank_samples_as_its_cache(
    folder: Path, sampled: Callable[..., Any], tmp_path: Path
) -> None:
    (checkpoint,) = checkpoints_of(folder / "run").values()
    lone = tmp_path / "lone.ckpt"
    lone.write_bytes(checkpoint.read_bytes())
    with pytest.raises(RepaError) as caught:
        sampled(checkpoint=lone)
    assert caught.value.field == "--bank"
    build_bank(out=tmp_path / "bank.safetensors", cache=str(folder / "cache"), console=quiet())
    by_file, of_file, _ = sampled(checkpoint=lone, bank=str(tmp_path / "bank.safetensors"))
    by_cache, of_cache, _ = sampled(checkpoint=lone, bank=str(folder / "cache"))
    by_run, _, _ = sampled()
    assert torch.equal(by_file, by_cache)
    assert torch.equal(by_file, by_run)
    assert of_file["bank"] == of_cache["bank"]
    build_bank(out=tmp_path / "few.safetensors", cache=str(folder / "cache"), rank=2, console=quiet())
    factored, of_factored, _ = sampled(checkpoint=lone, bank=str(tmp_path / "few.safetensors"))
    assert of_factored["bank"] != of_cache["bank"]
    assert (factored * by_run).sum(dim=1).min() > 0.5


def test_guidance_without_a_trained_null_is_said(sampled: Callable[..., Any], folder: Path) -> None:
    *_, printed = sampled(guidance=1.5)
    assert "note: " in printed
    *_, printed = sampled(run=folder / "dropping", guidance=1.5)
    assert "note: " not in printed


def test_the_first_version_samples_without_a_mask(sampled: Callable[..., Any], folder: Path) -> None:
    condition, _, _ = sampled(run=folder / "dropping", like=["2"], num=1)
    unit = units(folder, [2])
    torch.testing.assert_close(condition, torch.cat([unit, torch.ones(1, 48)], dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"like": [str(BROKEN)]}, "--like"),
        ({"like": [str(ROWS)]}, "--like"),
        ({"like": ["nowhere.png"]}, "--like"),
        ({"like": ["1"], "mix": "linear"}, "--like"),
        ({"mix": "linear"}, "--like"),
        ({"like": ["1", "2"], "mix": "half"}, "--mix"),
        ({"like": ["1", "2"], "alphas": [0.5]}, "--alpha"),
        ({"like": ["1", "2"], "mix": "mask", "alphas": [1.5]}, "--alpha"),
        ({"like": ["1", "2"], "mix": "mask", "alphas": [float("nan")]}, "--alpha"),
        ({"like": ["1"], "draw": "noise"}, "--draw"),
        ({"draw": "often"}, "--draw"),
        ({"like": ["1"], "encoder_weights": ["demo=x"]}, "--encoder-weights"),
        ({"bank": "nowhere"}, "--bank"),
        ({"labels": ["0"]}, "--label"),
    ],
)
def test_refused(sampled: Callable[..., Any], options: dict[str, Any], field: str) -> None:
    with pytest.raises(RepaError) as caught:
        sampled(**options)
    assert caught.value.field == field
    assert caught.value.remedy


def test_images_that_are_none(sampled: Callable[..., Any], folder: Path) -> None:
    broken = str(folder / "images" / "a" / f"{BROKEN:02}.png")
    for options, field in (
        ({"like": [broken]}, "--like"),
        ({"like": [broken], "encoder_weights": ["other=x"]}, "--encoder-weights"),
    ):
        with pytest.raises(RepaError) as caught:
            sampled(**options)
        assert caught.value.field == field


@pytest.mark.parametrize("flag", ["bank", "like", "draw"])
def test_a_model_of_classes_takes_no_vectors(sampled: Callable[..., Any], folder: Path, flag: str) -> None:
    value = {"bank": str(folder / "cache"), "like": ["1"], "draw": "noise"}[flag]
    with pytest.raises(RepaError) as caught:
        sampled(run=folder / "classes", **{flag: value})
    assert caught.value.field == f"--{flag}"


def test_a_bank_of_other_weights_or_another_column_is_refused(
    sampled: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bank.safetensors"
    build_bank(out=file, cache=str(folder / "cache"), console=quiet())
    with safe_open(file, framework="np") as opened:
        said = json.loads(opened.metadata()["repa_bank"])
    for change in (
        {"teacher": {**said["teacher"], "weights_sha256": "0" * 64}},
        {"column": "other/cls"},
    ):
        save_file(load_file(file), file, metadata={"repa_bank": json.dumps({**said, **change})})
        with pytest.raises(RepaError) as caught:
            sampled(bank=str(file))
        assert caught.value.field == "--bank"
    save_file(load_file(file), file, metadata={"repa_bank": json.dumps(said)})
    sampled(bank=str(file))


def test_figures_say_that_they_are_image_conditioned(folder: Path, tmp_path: Path) -> None:
    for name in ("run", "classes"):
        printed = io.StringIO()
        evaluate(
            EvaluateFlags(run=folder / name, num=8, steps=1, metrics="fd,kid_all", vae="demo"),
            console=Console(file=printed, width=300),
        )
        (evaluation,) = read_evaluations(folder / name)
        of_images = name == "run"
        assert ("image-conditioned" in printed.getvalue()) == of_images
        assert [each.protocol.endswith("image-conditioned") for each in evaluation.figures] == [of_images] * 2
        assert any("image-conditioned" in note for note in evaluation.notes) == of_images
        assert (evaluation.samples.labels is None) == of_images
        assert (evaluation.samples.bank is not None) == of_images
        with (folder / name / "evaluation.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [bool(row["condition"]) for row in rows] == [of_images] * 2
    page, _ = compare_runs([folder / "run", folder / "classes"])
    # a table of figures each, and of held-out losses each
    assert page.count("image-conditioned, not to be ranked") == 1
    assert "class tokens of images" in page


@pytest.mark.parametrize("npz", [True, False])
def test_finished_samples_say_it_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, npz: bool
) -> None:
    for name in ("run", "classes"):
        sample(SampleFlags(run=folder / name, num=6, steps=1, npz=npz, out=tmp_path / name), console=quiet())
        samples = tmp_path / name / "samples.npz" if npz else tmp_path / name
        flags = EvaluateFlags(
            samples=samples, reference=str(folder / "cache"), out=tmp_path / f"{name}-figures"
        )
        evaluate(flags, console=quiet())
        (evaluation,) = read_evaluations(tmp_path / f"{name}-figures")
        of_images = name == "run"
        assert (evaluation.samples.condition is not None) == of_images
        assert any("image-conditioned" in note for note in evaluation.notes) == of_images


def test_bank_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bank.safetensors"
    run_command(["bank", "build", str(folder / "cache"), "--out", str(out), "--rank", "3"])
    built = capsys.readouterr().out
    run_command(["bank", "info", str(out)])
    assert capsys.readouterr().out.splitlines() == built.splitlines()[-3:]
    for words, field in (
        (["--out", str(out)], "--out"),
        (["--out", str(tmp_path), "--replace"], "--out"),
        (["--out", str(tmp_path / "b"), "--rank", "0"], "--rank"),
        (["--out", str(tmp_path / "b"), "--rank", "14"], "--rank"),
        (["--out", str(tmp_path / "b"), "--view", "flip"], "--view"),
    ):
        with pytest.raises(RepaError) as caught:
            run_command(["bank", "build", str(folder / "cache"), *words])
        assert caught.value.field == field
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bank.safetensors"]
    with pytest.raises(SystemExit):
        main(["bank", "info", str(tmp_path / "no\nwhere")])
    assert capsys.readouterr().err.count("\n") == 1
    run_command(["bank", "build", str(folder / "cache"), "--out", str(out), "--replace"])
    assert "rank" not in capsys.readouterr().out
