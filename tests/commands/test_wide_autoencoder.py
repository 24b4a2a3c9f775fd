"""An autoencoder of stride 16 and 32 channels (f16d32) from images to samples: preprocess, train, sample."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.commands.sample import SampleFlags, sample
from repa.commands.train import TrainFlags, train
from repa.data.errors import RepaError
from repa.data.format.columns import AUTOENCODER, MOMENTS
from repa.data.format.manifest import LATENTS_NOTE
from repa.data.format.opening import open_manifest
from repa.pipeline.encoders.vae import STABLE_DIFFUSION, Autoencoder
from repa.trainer.models.lightningdit import LightningDiT
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.metrics import read_metrics
from repa.trainer.sampling.generate import model_of_run
from rich.console import Console

if TYPE_CHECKING:
    from pathlib import Path

SIDE, STRIDE, CHANNELS = 128, 16, 32
WIDE: dict[str, Any] = {
    **STABLE_DIFFUSION,
    "block_out_channels": (4, 4, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 5,
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": CHANNELS,
    "scaling_factor": 1.0,
}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "vae"
    build: Any = AutoencoderKL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        build(**WIDE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(vae: Path) -> Path:
    path = vae.parent / "cache"
    flags: dict[str, Any] = {"data": "demo", "cache": path, "limit": 12, "resolution": SIDE, "vae": str(vae)}
    preprocess(PreprocessFlags(**flags, batch_size=4, shard_rows=8), console=quiet())
    return path


def test_the_cache_has_its_channels_and_grid(cache: Path, vae: Path) -> None:
    manifest = open_manifest(cache)
    side = SIDE // STRIDE
    assert manifest.columns[MOMENTS].shape == (2 * CHANNELS, side, side)
    assert manifest.sources[AUTOENCODER].grid == (side, side)
    assert len(manifest.sources[AUTOENCODER].notes[LATENTS_NOTE]["mean"]) == CHANNELS
    assert Autoencoder.load(str(vae)).stride == STRIDE


def test_an_image_that_it_does_not_divide_is_refused(vae: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"data": "demo", "cache": tmp_path / "cache", "limit": 4, "vae": str(vae)}
    with pytest.raises(RepaError) as caught:
        preprocess(PreprocessFlags(**flags, resolution=SIDE - 8), console=quiet())
    assert caught.value.field == "--resolution"


def test_train_and_sample(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=32, heads=2))
    run, out = tmp_path / "run", tmp_path / "out"
    settings = ["latent_norm=channel", "log_every=1", "preview_every=3", "preview_count=4"]
    settings += ["preview_steps=2", "precision=32-true"]
    train(
        TrainFlags(
            method="none",
            model="LightningDiT-T/1",
            cache=str(cache),
            run=run,
            max_steps=3,
            batch_size=4,
            assignments=settings,
        ),
        console=quiet(),
    )
    rows = read_metrics(run / "metrics.csv")
    assert all(np.isfinite(row["velocity"]) for row in rows)
    assert (run / "samples" / "step-00000003.png").exists()
    model = model_of_run(run)
    assert isinstance(model.backbone, LightningDiT)
    assert model.latent_shape == (CHANNELS, SIDE // STRIDE, SIDE // STRIDE)
    assert model.scale is not None
    assert len(model.scale.mean) == CHANNELS
    sample(SampleFlags(run=run, num=2, steps=2, guidance=1.5, npz=True, out=out), console=quiet())
    with np.load(out / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (2, SIDE, SIDE, 3)
        assert arrays["arr_0"].std() > 0
