"""Encoders, decoders and distillation on fake tensors that say they are on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import DEVICE, fake, fake_cuda, is_fake, moved
from repa.pipeline.distill.pairs import Pairs
from repa.pipeline.distill.training import token_loss
from repa.pipeline.encoders import load_encoder
from repa.pipeline.encoders.idle_blocks import make_idle
from repa.pipeline.encoders.vae import Autoencoder

IMAGES = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)


def there(encoder: Any) -> Any:
    """Put a teacher on the device."""
    moved(encoder.model)
    encoder.device = DEVICE
    encoder._mean, encoder._std = fake(encoder._mean), fake(encoder._std)
    return encoder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_teacher(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = load_encoder("demo", resolution=64)
    with fake_cuda(monkeypatch) as refusals:
        there(encoder)
        encoder.compute_dtype = dtype
        images = fake(IMAGES)
        refusals.copies = True
        found = encoder.compute(images, attention=(1, encoder.depth))
        assert found.keys() == {"patch", "cls", "q", "k"}
        assert all(is_fake(each) and each.dtype == torch.float32 for each in found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_autoencoder(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = Autoencoder.load("demo")
    vae.device, vae.compute_dtype = DEVICE, dtype
    with fake_cuda(monkeypatch) as refusals:
        moved(vae._model)
        images = fake(IMAGES)
        refusals.copies = True
        moments = vae.encode_moments(images)
        assert (moments.dtype, moments.device) == (torch.float32, DEVICE)
        refusals.reads = True
        assert is_fake(vae.decode(moments[:, : vae.latent_channels]))


def test_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher: Any = load_encoder("demo", resolution=64)
    student = teacher.with_model(make_idle(teacher.model, 0.75, "batch")).in_float32()
    with fake_cuda(monkeypatch) as refusals:
        wanted = there(teacher).compute(fake(IMAGES))
        there(student).model.train()
        optimizer = torch.optim.AdamW([each.requires_grad_() for each in student.model.parameters()])
        images = fake(IMAGES)
        refusals.copies = True
        token_loss(
            student.compute(images), Pairs(images=images, patch=wanted["patch"], cls=wanted["cls"])
        ).backward()
        optimizer.step()
        assert all(map(is_fake, student.model.state_dict().values()))
