"""Sampling and the held-out pass on fake tensors that say they are on CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import DEVICE, Refusals, fake_cuda, is_fake, moved
from repa.data.reading.latents import LatentScale
from repa.trainer.models import registry
from repa.trainer.objectives.ddpm import Ddpm
from repa.trainer.objectives.flow import Flow
from repa.trainer.run.held_out import HeldOutBatch, held_out_sums
from repa.trainer.sampling.generate import TrainedModel, generate
from repa.trainer.sampling.settings import SamplerConfig
from repa.trainer.step.latents import MomentLatents

SCALE = LatentScale(0.5, 0.0, (0.0,) * 4, (1.0,) * 4)
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SiT": (registry.SiTConfig, {}),
    "beside": (registry.SiTConfig, {"token_widths": (6,)}),
    "DiT": (registry.DiTConfig, {}),
    "SiT-down": (registry.SiTDownConfig, {"outer": 1, "middle": 1, "mlp_width": 32}),
    "LightningDiT": (registry.LightningDiTConfig, {}),
}


def model_of(kind: str) -> TrainedModel:
    """Build a tiny network, on the CPU still."""
    build, settings = KINDS[kind]
    if "depth" in build.__dataclass_fields__:
        settings = {**settings, "depth": 1}
    config = build(width=24, heads=2, patch_size=2, input_size=8, num_classes=5, **settings)
    return TrainedModel(
        backbone=registry.build(config).eval(),
        objective=Ddpm(Ddpm.config_class()) if kind == "DiT" else Flow(Flow.config_class()),
        scale=SCALE,
        autoencoder=None,
        autoencoder_sha256=None,
        autoencoder_random=False,
        steps=1,
        origin=Path("nowhere"),
    )


def sampled(model: TrainedModel, settings: SamplerConfig, refusals: Refusals) -> torch.Tensor:
    refusals.reads = True
    condition = torch.zeros(4, dtype=torch.int64)
    first, second = generate(model, condition, settings, seed=0, batch_size=2)
    assert first.shape == second.shape == (2, 4, 8, 8)
    return first


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("SiT", {"solver": "euler"}),
        ("SiT", {"solver": "heun", "guidance": 2.0, "interval": (0.3, 0.9), "shift": 0.3}),
        ("SiT", {"solver": "sde", "guidance": 2.0, "guidance_channels": "three"}),
        ("SiT-down", {"solver": "sde-heun", "guidance": 2.0}),
        ("beside", {"solver": "sde", "guidance": 2.0, "guidance_cls": 1.5}),
        ("LightningDiT", {"solver": "heun"}),
        ("DiT", {"solver": "ddpm", "guidance": 2.0, "guidance_channels": "three"}),
        ("DiT", {"solver": "ddim"}),
    ],
)
def test_samples(kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind)
    with fake_cuda(monkeypatch) as refusals:
        moved(model.backbone)
        assert is_fake(sampled(model, SamplerConfig(steps=3, **settings), refusals))


@pytest.mark.parametrize("kind", ["SiT", "DiT"])
def test_the_held_out_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches are read to the host, and its networks are where they train."""
    model = model_of(kind)
    batch = HeldOutBatch(
        first=0, columns={"sd-vae/moments": torch.zeros(3, 8, 8, 8)}, label=torch.zeros(3, dtype=torch.int64)
    )
    with fake_cuda(monkeypatch) as refusals:
        refusals.reads = True
        moved(model.backbone)
        sums, rows = held_out_sums(
            {"a": model.backbone},
            iter([batch]),
            objective=model.objective,
            latents=MomentLatents(SCALE),
            seed=0,
            device=DEVICE,
            context=lambda: torch.autocast("cuda", torch.bfloat16),
        )
    assert rows == 3
    assert sums.keys() == {"a"}
