"""LightningDiT on VA-VAE's latents (Yao & Wang, arXiv 2501.01423)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Figure, Sampling, recipe
from .shared import DRAWS, VAVAE, VAVAE_NOTES, trained

if TYPE_CHECKING:
    from ..trainer.config import TrainConfig

_EPOCH = 1_250
_GUIDED = Sampling(
    solver="euler", steps=250, shift=0.3, guidance=6.7, channels="three", interval=(0.0, 0.875), vae=VAVAE.vae
)


@recipe(
    "lightningdit-xl-1",
    paper="2501.01423",
    reproduces="LightningDiT-XL/1 on VA-VAE with guidance, 64 and 800 epochs of 1,024 images a step",
    encoding=VAVAE,
    figures=(
        Figure(step=64 * _EPOCH, fid=2.11, sampling=None, remark="with guidance of a scale we do not know"),
        Figure(step=800 * _EPOCH, fid=1.35, sampling=_GUIDED),
    ),
    deviations=(
        "The published loss has 1 − cos of predicted and true velocity over the channels too. Here it is the "
        "velocity loss alone.",
        DRAWS,
    ),
    notes=VAVAE_NOTES,
)
def lightningdit_xl() -> TrainConfig:
    """Train LightningDiT-XL/1 on latents of 16×16 and 32 channels."""
    return trained(
        method="none",
        model="LightningDiT-XL/1",
        batch_size=1024,
        max_steps=800 * _EPOCH,
        lr=2e-4,
        betas=(0.9, 0.95),
        objective__times="lognormal",
        keep_every=32 * _EPOCH,
    )
