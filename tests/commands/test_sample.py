"""`repa sample` as a function: what is written, from which weights, and what the noise depends on."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from repa.commands.sample import SampleFlags, sample
from repa.data.errors import RepaError
from repa.data.reading.latents import LatentScale
from repa.data.testing import synthetic_cache
from repa.trainer.config import build
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.fit import fit
from repa.trainer.sampling.generate import model_of_run
from repa.trainer.sampling.pictures import save_array_file
from repa.trainer.step.checkpoints import checkpoints_of, load_checkpoint
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

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

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        # [B, 4, 4, 4] → [B, 3, 4, 4]; a level is 0.05 of the unscaled latent
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def run_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any, str]]:
    """Sample with the plain decoder; images ``[N, H, W, 3]``, labels and what was printed."""
    monkeypatch.setattr("repa.commands.sample._decoder", lambda *_: LatentPixels())

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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grid.png", "samples.npz"]


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
    _, labels, _ = run_sample("a", run=run, labels=(2, 0))
    assert labels.tolist() == [2, 0, 2, 0, 2]


def test_png_files_and_a_grid(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repa.commands.sample._decoder", lambda *_: LatentPixels())
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
    ("options", "part"),
    [
        ({}, "--run, or a checkpoint with --ckpt"),
        ({"num": 0}, "--num 0"),
        ({"labels": (3,)}, "the model has 3 classes, label 3 is none of them; give 0 to 2"),
        ({"solver": "rk4"}, "rk4"),
        ({"interval": (0.8, 0.1)}, "interval"),
        ({"weights": "best"}, "best"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, options: dict[str, Any], part: str) -> None:
    flags = SampleFlags(**({"run": run, **options} if options else {}), out=tmp_path / "o")
    with pytest.raises(RepaError) as caught:
        sample(flags, console=Console(file=io.StringIO()))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


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
