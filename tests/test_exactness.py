"""Cached is online: REPA's loss from the cache against the loss with the teacher called live."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.format.columns import MOMENTS
from repa.data.reading.latents import latent_scale, sample_posterior, scale_latent
from repa.data.reading.reader import CacheReader
from repa.pipeline.encoders import load_encoder
from repa.pipeline.encoders.vae import Autoencoder
from repa.pipeline.images.open import open_source
from repa.trainer.methods.base import Step
from repa.trainer.methods.repa import Repa, RepaConfig
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives.base import squared_error
from repa.trainer.objectives.paths import interpolant
from torch import Tensor

IMAGES = 40
BATCH_SIZE = 16
SHARD_ROWS = 24  # batches restart at each shard: 16, 8, 16 rows
PATCH = "demo/patch"
UNIT_ROUNDOFF = 2.0**-11


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The shard loop computes each batch with one thread; so does the live teacher here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def written_cache(folder: Path, feature_dtype: str) -> Path:
    flags = PreprocessFlags(
        data="demo",
        cache=folder / feature_dtype,
        limit=IMAGES,
        batch_size=BATCH_SIZE,
        shard_rows=SHARD_ROWS,
        feature_dtype=feature_dtype,
    )
    preprocess(flags)
    return folder / feature_dtype


def batches() -> list[np.ndarray]:
    """The rows that preprocess put through the models together."""
    shards = [np.arange(start, min(start + SHARD_ROWS, IMAGES)) for start in range(0, IMAGES, SHARD_ROWS)]
    return [shard[i : i + BATCH_SIZE] for shard in shards for i in range(0, len(shard), BATCH_SIZE)]


def images_of(rows: np.ndarray) -> Tensor:
    source = open_source("demo", limit=IMAGES)
    pixels = np.stack([np.asarray(source.load(int(row))) for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def cached(reader: CacheReader, rows: np.ndarray) -> dict[str, Tensor]:
    out = {
        name: np.empty((len(rows), *reader.manifest.columns[name].shape), reader.manifest.columns[name].dtype)
        for name in reader.columns
    }
    reader.read_rows(rows.astype(np.int64), reader.columns, out)
    return {name: torch.from_numpy(values) for name, values in out.items()}


def losses(reader: CacheReader, moments: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Velocity loss, REPA loss and all gradients of one step whose draws depend on nothing but the sizes."""
    torch.manual_seed(0)
    backbone = SiT(SiTConfig.named("SiT-T/1", input_size=8, num_classes=12))
    for parameter in backbone.parameters():
        # adaLN and the output begin at zero, where no gradient passes
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    method = Repa(
        RepaConfig(projector_width=64),
        backbone.facts,
        reader.manifest.columns,
        {name: source.grid for name, source in reader.manifest.sources.items()},
    )
    generator = torch.Generator().manual_seed(1)
    scale = latent_scale(reader.manifest, where=str(reader.path))
    noise = torch.randn(len(moments), 4, 8, 8, generator=generator)
    x0 = scale_latent(sample_posterior(moments, torch.randn(noise.shape, generator=generator)), *scale)
    t = torch.rand(len(moments), generator=generator)
    path = interpolant("linear")
    condition = torch.arange(len(moments)) % 12
    student = backbone(path.interpolate(x0, noise, t), t, condition, method.capture(method.phases()[0]))
    step = Step(
        index=0,
        columns={PATCH: targets},
        x0=x0,
        noise=noise,
        t=t,
        condition=condition,
        student=student,
        interpolate=lambda times: path.interpolate(x0, noise, times),
        generator=generator,
    )
    term = method.losses(step)["repa"]
    velocity = squared_error(student.prediction, path.velocity(x0, noise, t)).mean()
    (velocity + term.weight * term.value).backward()
    gradients = [p.grad for p in (*backbone.parameters(), *method.parameters()) if p.grad is not None]
    return velocity.detach(), term.value.detach(), gradients


def test_float32_cache_is_the_live_teacher_bit_for_bit(tmp_path: Path) -> None:
    teacher = load_encoder("demo", resolution=64)
    autoencoder = Autoencoder.load("demo")
    with CacheReader(written_cache(tmp_path, "float32"), (MOMENTS, PATCH)) as reader:
        for rows in batches():
            stored = cached(reader, rows)
            pixels = images_of(rows)
            live = teacher.encode(pixels)["patch"].clone()
            moments = autoencoder.encode_moments(pixels).clone()
            assert torch.equal(stored[MOMENTS], moments)
            assert torch.equal(stored[PATCH], live)
            here, there = losses(reader, stored[MOMENTS], stored[PATCH]), losses(reader, moments, live)
            assert torch.equal(here[0], there[0])
            assert torch.equal(here[1], there[1])
            assert len(here[2]) == len(there[2]) > 50
            assert all(torch.equal(a, b) for a, b in zip(here[2], there[2], strict=True))


def test_float16_cache_is_the_live_teacher_within_its_rounding(tmp_path: Path) -> None:
    """The bound is derived in `cosine_similarity`: each cosine moves by at most η / √(1 − η²)."""
    teacher = load_encoder("demo", resolution=64)
    with CacheReader(written_cache(tmp_path, "float16"), (MOMENTS, PATCH)) as reader:
        for rows in batches():
            stored = cached(reader, rows)
            assert stored[PATCH].dtype == torch.float16
            live = teacher.encode(images_of(rows))["patch"].clone()
            assert torch.equal(stored[PATCH], live.to(torch.float16))
            shortest = live.norm(dim=-1).min().item()
            eta = UNIT_ROUNDOFF + 2.0**-25 * math.sqrt(live.shape[-1]) / shortest
            bound = eta / math.sqrt(1 - eta**2)
            difference = (
                losses(reader, stored[MOMENTS], stored[PATCH])[1] - losses(reader, stored[MOMENTS], live)[1]
            )
            # 1e-6 for the float32 of the two losses themselves
            assert abs(difference.item()) <= bound + 1e-6
