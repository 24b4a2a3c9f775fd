"""What several papers train with, and in what this repa deviates from several of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..trainer.config import build
from .base import Encoding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..trainer.config import TrainConfig

EPOCH = 5_000
"""Steps of an epoch as the papers count, 80 epochs for 400,000 steps of 256 images."""

VAVAE = Encoding(encoders=(), vae="vavae", channels=32, stride=16, imported="lightningdit")
"""Latents of VA-VAE as LightningDiT's authors publish them, or their program writes them."""
VAVAE_NOTES = (
    "The latents are those that LightningDiT's authors publish, or their program writes, with the mirrored "
    "images; they are normalised by the statistics that come with them.",
    "vavae is a folder with VA-VAE as an AutoencoderKL of diffusers, which decodes samples.",
)

# REPA, arXiv 2410.06940, and whoever built on its code
OF_REPA: Mapping[str, Any] = {
    "batch_size": 256,
    "lr": 1e-4,
    "lr_warmup": 0,
    "lr_schedule": "constant",
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "clip": 1.0,
    "ema_decay": 0.9999,
    "label_dropout": 0.1,
    "seed": 0,
}
_OF_FLOW: Mapping[str, Any] = {"objective.path": "linear", "objective.times": "uniform"}

DRAWS = "Weights, noise and order are drawn by our generators, not by the released program's."
HALF_PRECISION = (
    "The released code trains in float16. Here precision=auto is bfloat16 where the GPU computes it; "
    "--set precision=16-mixed is float16."
)


def trained(**settings: Any) -> TrainConfig:
    """Return a configuration of REPA's training of a flow with some settings.

    Args:
        settings: as of ``--set``, with ``__`` for the dot.
    """
    return build(flags={**OF_REPA, **_OF_FLOW, **_dotted(settings)})


def trained_on_steps(**settings: Any) -> TrainConfig:
    """Return a configuration of REPA's training of a DiT, on the steps of DDPM, with some settings.

    Args:
        settings: as of `trained`.
    """
    return build(flags={**OF_REPA, **_dotted(settings)})


def _dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): each for key, each in settings.items()}
