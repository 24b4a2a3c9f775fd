"""`repa sample` as a function: what is written, from which weights, and what the noise depends on."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from repa.commands.sample import SampleFlags, sample
from repa.commands.shared.sampling import sample_batches
from repa.data.errors import RepaError
from repa.data.reading.latents import LatentScale
from repa.data.testing import synthetic_cache
from repa.pipeline.demo import VAE_FOLDER
from repa.trainer.config import build
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.fit import fit
from repa.trainer.sampling.generate import model_of_file, model_of_run
from repa.trainer.sampling.pictures import save_array_file
from repa.trainer.sampling.record import SampleFolder, SamplingRecord
from repa.trainer.step.checkpoints import checkpoints_of, load_checkpoint
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Run = Callable[..., tuple[Any, Any, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of three steps, with weights that are not zero where SiT begins at zero."""
    folder = tmp_path_factory.mktemp("sample")
    synthetic_cache(folder / "cache", num_rows=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=3))
        values = {
            "cache": str(folder / "cache"),
            "model": "SiT-T/2",
            "method": "none",
            "max_steps": 3,
            "batch_size": 8,
            "lr": 1e-2,
            "ema_decay": 0.5,
            "preview_every": 0,
            "path": "cosine",
        }
        fit(build(flags=values), folder / "run", console=Console(file=io.StringIO()))
        yield folder / "run"


class LatentPixels:
    """Decodes a latent to an image that shows every one of its numbers."""

    name = "pixels"
    weights_sha256 = "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        # [B, 4, 4, 4] → [B, 3, 4, 4]; a level is 0.05 of the unscaled latent
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def run_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any, str]]:
    """Sample with the plain decoder; images ``[N, H, W, 3]``, labels and what was printed."""
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: LatentPixels())

    def go(name: str = "out", **options: Any) -> tuple[Any, Any, str]:
        printed = io.StringIO()
        out = tmp_path / name
        flags = SampleFlags(**{"num": 5, "steps": 3, "npz": True, "out": out, **options})
        sample(flags, console=Console(file=printed))
        with np.load(out / "samples.npz") as arrays:
            return arrays["arr_0"], arrays["arr_1"], printed.getvalue()

    return go


def assert_same_images(first: Any, second: Any) -> None:
    """Up to the rounding of a matrix product, which may move a number over the edge of a level."""
    assert first.shape == second.shape
    assert np.abs(first.astype(int) - second.astype(int)).max() <= 1


def test_the_array_file_is_what_the_adm_suite_reads(run: Path, run_sample: Run, tmp_path: Path) -> None:
    images, labels, printed = run_sample(run=run)
    assert (images.dtype, images.shape) == (np.uint8, (5, 4, 4, 3))
    assert (labels.dtype, labels.tolist()) == (np.int64, [0, 1, 2, 0, 1])
    assert images.std() > 5
    assert "Wrote 5 images" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "grid.png",
        "samples.npz",
        "sampling.json",
    ]


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_batches_change_no_sample(run: Path, run_sample: Run, solver: str) -> None:
    options = {"run": run, "solver": solver, "guidance": 1.5, "interval": (0.1, 0.8)}
    first, _, _ = run_sample("a", batch_size=2, **options)
    second, _, _ = run_sample("b", batch_size=5, **options)
    assert_same_images(first, second)
    fewer, _, _ = run_sample("c", num=3, batch_size=5, **options)
    assert_same_images(first[:3], fewer)


def test_the_seed_decides(run: Path, run_sample: Run) -> None:
    first, _, _ = run_sample("a", run=run, seed=0)
    again, _, _ = run_sample("b", run=run, seed=0)
    other, _, _ = run_sample("c", run=run, seed=1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_ema_and_model_weights(run: Path, run_sample: Run) -> None:
    ema, _, _ = run_sample("a", run=run)
    model, _, _ = run_sample("b", run=run, weights="model")
    assert not np.array_equal(ema, model)
    state = load_checkpoint(checkpoints_of(run)[3])["state_dict"]
    for weights, prefix in (("ema", "ema."), ("model", "backbone.")):
        loaded = model_of_run(run, weights=weights).backbone.state_dict()
        assert all(torch.equal(value, state[prefix + key]) for key, value in loaded.items())


def test_what_a_run_says_of_itself(run: Path) -> None:
    model = model_of_run(run)
    assert (model.objective.path.name, model.steps) == ("cosine", 3)
    assert model.scale == LatentScale(0.18215)
    assert (model.autoencoder, model.autoencoder_random) == ("synthetic/sd-vae", False)
    assert not model.backbone.training


def test_a_checkpoint_file_is_as_good_as_its_run(run: Path, run_sample: Run) -> None:
    of_run, _, _ = run_sample("a", run=run)
    of_file, _, _ = run_sample("b", checkpoint=checkpoints_of(run)[3])
    assert np.array_equal(of_run, of_file)


def test_a_published_checkpoint(run: Path, run_sample: Run, tmp_path: Path) -> None:
    """The same weights in the published form, whose path is linear unless it says so."""
    state = load_checkpoint(checkpoints_of(run)[3])["state_dict"]
    published = {
        name: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for name, prefix in (("ema", "ema."), ("model", "backbone."))
    }
    torch.save({**published, "opt": {}, "steps": 3}, tmp_path / "published.pt")
    images, labels, _ = run_sample("a", checkpoint=tmp_path / "published.pt")
    assert images.shape == (5, 4, 4, 3)
    assert labels.tolist() == [0, 1, 2, 0, 1]
    of_run, _, _ = run_sample("b", run=run)
    assert np.array_equal(images, of_run)
    # only the SDE asks for the path, which gives the score
    sde = {"solver": "sde", "steps": 4}
    images, _, _ = run_sample("c", checkpoint=tmp_path / "published.pt", **sde)
    of_run, _, _ = run_sample("d", run=run, **sde)
    assert not np.array_equal(images, of_run)


def test_labels_in_turn(run: Path, run_sample: Run) -> None:
    _, labels, _ = run_sample("a", run=run, labels=("2", "0"))
    assert labels.tolist() == [2, 0, 2, 0, 2]


def test_png_files_and_a_grid(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: LatentPixels())
    out = tmp_path / "png"
    flags = SampleFlags(run=run, num=70, steps=1, out=out, batch_size=16)
    sample(flags, console=Console(file=io.StringIO()))
    assert len(list(out.glob("0*.png"))) == 70
    with Image.open(out / "000069.png") as image:
        assert (image.size, image.mode) == ((4, 4), "RGB")
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (8 * 6 + 2, 8 * 6 + 2)


def test_the_demos_autoencoder(run: Path, tmp_path: Path) -> None:
    printed = io.StringIO()
    flags = SampleFlags(run=run, num=2, steps=1, vae="demo", out=tmp_path / "out")
    sample(flags, console=Console(file=printed, width=300))
    assert "note: demo has other weights than the autoencoder" in printed.getvalue()
    with Image.open(tmp_path / "out" / "000001.png") as image:
        assert image.size == (32, 32)


def test_without_an_autoencoder_nothing_is_sampled(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled although there is nothing to decode with")

    monkeypatch.setattr("repa.trainer.sampling.generate.sample", never)
    flags = SampleFlags(run=run, vae=str(tmp_path), out=tmp_path / "out")
    with pytest.raises(RepaError):
        sample(flags, console=Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "--run"),
        ({"num": 0}, "--num"),
        ({"batch_size": 0}, "--batch-size"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**70}, "--seed"),
        ({"steps": 10**9}, "--steps"),
        ({"guidance": float("nan")}, "--guidance"),
        ({"guidance": float("inf")}, "--guidance"),
        ({"guidance": -1.0}, "--guidance"),
        ({"devices": 0}, "--devices"),
        ({"devices": 1000}, "--devices"),
        ({"labels": ("3",)}, "--label"),
        ({"labels": ("-1",)}, "--label"),
        ({"labels": ("9" * 5000,)}, "--label"),
        ({"labels": ("nothing like it",)}, "--label"),
        ({"solver": "rk4"}, "--solver"),
        ({"solver": "sde", "steps": 1}, "--steps"),
        ({"interval": (0.8, 0.1)}, "--interval"),
        ({"weights": "best"}, "--weights"),
    ],
)
def test_mistakes(
    run: Path, tmp_path: Path, options: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: LatentPixels())
    flags = SampleFlags(**({"run": run, **options} if options else {}), out=tmp_path / "o")
    with pytest.raises(RepaError) as caught:
        sample(flags, console=Console(file=io.StringIO()))
    assert caught.value.field == field
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_labels_by_name(run: Path, run_sample: Run) -> None:
    names = model_of_run(run).class_names
    assert len(names) == 3
    _, labels, _ = run_sample("a", run=run, labels=(names[2], names[1].upper()))
    assert labels.tolist() == [2, 1, 2, 1, 2]
    with pytest.raises(RepaError) as caught:
        run_sample("b", run=run, labels=(names[1] + "x",))
    assert names[1] in caught.value.remedy


def test_a_folder_holds_one_sampling_and_its_record(run: Path, run_sample: Run, tmp_path: Path) -> None:
    run_sample("a", run=run, num=5)
    record = json.loads((tmp_path / "a" / "sampling.json").read_text())
    file = checkpoints_of(run)[3]
    assert record["checkpoint_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (record["step"], record["weights"], record["seed"], record["num"]) == (3, "ema", 0, 5)
    assert (record["labels"], record["form"], record["finished"]) == ([], "npz", True)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for other in ({"seed": 1}, {"num": 4}, {"weights": "model"}, {"npz": False}, {"labels": ("1",)}):
        with pytest.raises(RepaError) as caught:
            run_sample("a", **{"run": run, "num": 5, **other})
        assert caught.value.field == "--out"
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    replaced, _, _ = run_sample("a", run=run, num=4, seed=1, replace=True)
    assert len(replaced) == 4
    assert json.loads((tmp_path / "a" / "sampling.json").read_text())["seed"] == 1
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_images_without_a_record_are_not_mixed_with_others(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: LatentPixels())
    out = tmp_path / "out"
    out.mkdir()
    for number in range(9):
        Image.new("RGB", (4, 4)).save(out / f"{number:06d}.png")
    flags = SampleFlags(run=run, num=3, steps=1, out=out)
    with pytest.raises(RepaError) as caught:
        sample(flags, console=Console(file=io.StringIO()))
    assert caught.value.field == "--out"
    assert len(list(out.glob("0*.png"))) == 9
    sample(replace(flags, replace=True), console=Console(file=io.StringIO()))
    assert len(list(out.glob("0*.png"))) == 3


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"num": "x"}', b"\xff", b"[" * 5000])
def test_a_damaged_record_is_one_line(run: Path, tmp_path: Path, damage: bytes) -> None:
    record = SamplingRecord(
        checkpoint="a", checkpoint_sha256="0", step=3, weights="ema", autoencoder="pixels",
        autoencoder_sha256="0", num=5, labels=(), solver="euler", steps=3, guidance=1.0,
        interval=(0.0, 1.0), seed=0, batch_size=4, form="png",
    )  # fmt: skip
    (tmp_path / "sampling.json").write_bytes(damage)
    with pytest.raises(RepaError) as caught:
        SampleFolder(tmp_path, record).open(replace_other=False)
    assert "\n" not in str(caught.value)
    SampleFolder(tmp_path, record).open(replace_other=True)
    SampleFolder(tmp_path, record).open(replace_other=False)


class Stopped(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("npz", [True, False])
def test_an_interrupted_sampling_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, npz: bool
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = SampleFlags(run=run, num=7, steps=2, batch_size=2, npz=npz, out=whole)
    printed = io.StringIO()
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: LatentPixels())
    sample(flags, console=Console(file=printed))

    decoded: list[int] = []

    class DiesOnce(LatentPixels):
        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            decoded.append(len(latent))
            if len(decoded) == 3:
                raise Stopped
            return super().decode(latent)

    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: DiesOnce())
    flags = replace(flags, out=broken)
    with pytest.raises(Stopped):
        sample(flags, console=Console(file=printed))
    assert json.loads((broken / "sampling.json").read_text())["finished"] is False
    sample(flags, console=Console(file=printed, width=300))
    assert decoded == [2, 2, 2, 2, 1]
    assert "4 of 7 images are in" in printed.getvalue()
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        if path.suffix != ".npz":
            assert path.read_bytes() == (broken / path.name).read_bytes(), path.name
    if npz:
        with np.load(whole / "samples.npz") as one, np.load(broken / "samples.npz") as two:
            assert np.array_equal(one["arr_0"], two["arr_0"])
    sample(flags, console=Console(file=printed))
    assert len(decoded) == 5


def test_batches_dealt_to_several_are_the_same_images(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt: list[tuple[int, ...]] = []

    def in_turn(_: Any, jobs: Any, report: Any, *, what: str) -> None:
        assert what == "sampling"
        for job in reversed(jobs):
            dealt.append(job.batches)
            sample_batches(job, model_of_file(job.checkpoint), LatentPixels(), report)

    monkeypatch.setattr("repa.commands.shared.sampling_checks.check_devices", lambda *_: None)
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: LatentPixels())
    monkeypatch.setattr("repa.commands.shared.processes.in_processes", in_turn)
    for name, devices in (("one", 1), ("three", 3)):
        flags = SampleFlags(run=run, num=9, steps=2, batch_size=2, out=tmp_path / name, devices=devices)
        sample(flags, console=Console(file=io.StringIO()))
    assert dealt == [(4,), (2, 8), (0, 6)]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 11
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes(), name


@pytest.mark.thorough
def test_processes_make_the_same_images(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repa.commands.shared.sampling_checks.check_devices", lambda *_: None)
    torch.set_num_threads(1)
    for name, devices in (("one", 1), ("two", 2)):
        # the run's network is not among the sizes, its checkpoint alone says what it is
        flags = SampleFlags(
            run=run, num=5, steps=2, batch_size=2, vae="demo", out=tmp_path / name, devices=devices
        )
        sample(flags, console=Console(file=io.StringIO()))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_what_is_not_finite_is_an_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: LatentPixels())
    checkpoint = load_checkpoint(checkpoints_of(run)[3])
    for key, value in checkpoint["state_dict"].items():
        if key.endswith("final_layer.linear.bias"):
            checkpoint["state_dict"][key] = torch.full_like(value, float("nan"))
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(RepaError) as caught:
        sample(
            SampleFlags(checkpoint=tmp_path / "bad.ckpt", num=1, steps=1), console=Console(file=io.StringIO())
        )
    assert caught.value.field == "--ckpt"
    assert not list((tmp_path / "bad-samples").glob("0*.png"))


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file["repa"].update(backbone={"foo": 1}),
        lambda file: file["repa"].update(backbone=5),
        lambda file: file["repa"]["backbone"].update(depth="x"),
        lambda file: file["repa"]["backbone"].update(patch_size=0),
        lambda file: file["repa"]["backbone"].update(width=30),
        lambda file: file["repa"].update(latent={}),
        lambda file: file["repa"]["latent"].update(scaling_factor="much"),
        lambda file: file.update(repa={}),
        lambda file: file.pop("state_dict"),
        lambda file: file["state_dict"].update({"ema.pos_embed": torch.zeros(3)}),
        lambda file: file["state_dict"].update({"ema.pos_embed": torch.zeros(1, 4, 48, dtype=torch.int64)}),
    ],
)
def test_checkpoints_that_others_edited_are_one_line(run: Path, tmp_path: Path, change: Any) -> None:
    checkpoint = load_checkpoint(checkpoints_of(run)[3])
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    with pytest.raises(RepaError) as caught:
        model_of_file(tmp_path / "edited.ckpt")
    assert str(caught.value).isprintable()
    assert caught.value.remedy


@pytest.mark.parametrize("content", [5, {1: torch.zeros(2)}, {"repa": {}}, {"repa": 5, "state_dict": {}}, {}])
def test_files_that_are_no_checkpoint_of_anything(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(RepaError) as caught:
        model_of_file(tmp_path / "file.pt")
    assert str(caught.value).isprintable()


def test_guidance_needs_a_null_class_that_was_trained(run: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(checkpoints_of(run)[3])
    checkpoint["repa"]["settings"]["label_dropout"] = 0.0
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(RepaError) as caught:
        sample(SampleFlags(checkpoint=tmp_path / "a.ckpt", guidance=2.0), console=Console(file=io.StringIO()))
    assert caught.value.field == "--guidance"


def test_latents_of_other_channels_are_refused_before_sampling(run: Path, tmp_path: Path) -> None:
    vae = Path(shutil.copytree(VAE_FOLDER, tmp_path / "vae"))
    config = json.loads((vae / "config.json").read_text())
    build: Any = AutoencoderKL
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    build(**{**values, "latent_channels": 3}).save_pretrained(vae)
    with pytest.raises(RepaError) as caught:
        sample(SampleFlags(run=run, vae=str(vae), out=tmp_path / "o"), console=Console(file=io.StringIO()))
    assert caught.value.field == "--vae"
    assert not (tmp_path / "o").exists()


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(RepaError, match="holds no checkpoint"):
        sample(SampleFlags(run=tmp_path), console=Console(file=io.StringIO()))


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "text.ckpt"
    file.write_text("no checkpoint")
    with pytest.raises(RepaError, match=r"text\.ckpt"):
        sample(SampleFlags(checkpoint=file), console=Console(file=io.StringIO()))


def test_array_file_counts(tmp_path: Path) -> None:
    batch = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="2 images came for 3 labels"):
        save_array_file(tmp_path / "a.npz", iter([batch]), np.zeros(3, np.int64))
    assert not (tmp_path / "a.npz").exists()
