"""SiT without alignment, the baseline (Ma et al., arXiv 2401.08740)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import STABLE_DIFFUSION_VAE, Encoding, Figure, Sampling, recipe
from .shared import DRAWS, EPOCH, trained

if TYPE_CHECKING:
    from ..trainer.config import TrainConfig

_PAPER = "2401.08740"
# the paper mirrors half of the images
_LATENTS = Encoding(encoders=(), views="flip")
_VAE = STABLE_DIFFUSION_VAE.replace("-mse", "-ema")
_UNGUIDED = Sampling(vae=_VAE)
_GUIDED = Sampling(guidance=1.5, vae=_VAE)
_DEVIATIONS = (DRAWS,)
_NOTES = (
    "Stable Diffusion's two fine-tuned autoencoders, mse and ema, have one encoder, so that one cache serves "
    "both; samples are decoded by the paper's.",
)


@recipe(
    "sit-b-2",
    paper=_PAPER,
    reproduces="SiT-B/2 at 400 K steps without guidance",
    encoding=_LATENTS,
    figures=(Figure(step=400_000, fid=33.0, sampling=_UNGUIDED),),
    deviations=_DEVIATIONS,
    notes=_NOTES,
)
def sit_b() -> TrainConfig:
    """Train SiT-B/2, the baseline of the small models."""
    return trained(method="none", model="SiT-B/2", max_steps=400_000, clip="none")


@recipe(
    "sit-l-2",
    paper=_PAPER,
    reproduces="SiT-L/2 at 400 K steps without guidance",
    encoding=_LATENTS,
    figures=(Figure(step=400_000, fid=18.8, sampling=_UNGUIDED),),
    deviations=_DEVIATIONS,
    notes=_NOTES,
)
def sit_l() -> TrainConfig:
    """Train SiT-L/2 without alignment."""
    return trained(method="none", model="SiT-L/2", max_steps=400_000, clip="none")


@recipe(
    "sit-xl-2",
    paper=_PAPER,
    reproduces="SiT-XL/2, without guidance at 400 K and 7 M steps, with guidance at 7 M",
    encoding=_LATENTS,
    figures=(
        Figure(step=400_000, fid=17.2, sampling=_UNGUIDED),
        Figure(step=7_000_000, fid=8.3, sampling=_UNGUIDED),
        Figure(step=7_000_000, fid=2.06, sampling=_GUIDED),
    ),
    deviations=_DEVIATIONS,
    notes=_NOTES,
)
def sit_xl() -> TrainConfig:
    """Train SiT-XL/2, the baseline of the large models."""
    return trained(method="none", model="SiT-XL/2", max_steps=7_000_000, clip="none")


@recipe(
    "sit-xl-2-512",
    paper=_PAPER,
    reproduces="SiT-XL/2 at 512², 600 epochs with guidance",
    encoding=Encoding(encoders=(), resolution=512, views="flip"),
    figures=(Figure(step=600 * EPOCH, fid=2.62, inception_score=252.2, sampling=_GUIDED),),
    deviations=_DEVIATIONS,
    notes=_NOTES,
)
def sit_xl_512() -> TrainConfig:
    """Train SiT-XL/2 on images of 512²."""
    return trained(method="none", model="SiT-XL/2", max_steps=600 * EPOCH, clip="none")
