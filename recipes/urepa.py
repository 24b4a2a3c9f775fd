"""U-REPA and its backbone (arXiv 2503.18414)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import STABLE_DIFFUSION_VAE, Encoding, Figure, Sampling, recipe
from .shared import trained

if TYPE_CHECKING:
    from ..trainer.config import TrainConfig

_PAPER = "2503.18414"
_VAE = STABLE_DIFFUSION_VAE.replace("-mse", "-ema")
_UNGUIDED = Sampling(vae=_VAE)
_GUIDED = Sampling(guidance=1.65, interval=(0.0, 0.7), vae=_VAE)
_DEVIATIONS = (
    "The authors' code could not be had. The up-sampling kernel, the initialisation of the new layers and "
    "some biases are ours, see docs/methods/urepa.md.",
)
_NOTES = ("The paper's autoencoder is sd-vae-ft-ema, whose encoder is that of sd-vae-ft-mse.",)
_TAP = ("The block that is aligned is ours, the middle one: the paper names XL's alone.",)


def _urepa(model: str, depth: int, max_steps: int) -> TrainConfig:
    return trained(
        method="urepa",
        model=model,
        max_steps=max_steps,
        method__encoders="dinov2-b",
        method__depth=depth,
        method__weight=0.5,
        method__relations=3.0,
    )


@recipe(
    "urepa-b-2",
    paper=_PAPER,
    reproduces="SiT↓-B/2 + U-REPA at 400 K steps without guidance",
    encoding=Encoding(),
    figures=(Figure(step=400_000, fid=15.3, sampling=_UNGUIDED),),
    deviations=(*_DEVIATIONS, *_TAP),
    notes=_NOTES,
)
def urepa_b() -> TrainConfig:
    """Train SiT-down-B/2 with U-REPA."""
    return _urepa("SiT-down-B/2", 8, 400_000)


@recipe(
    "urepa-l-2",
    paper=_PAPER,
    reproduces="SiT↓-L/2 + U-REPA at 400 K steps without guidance",
    encoding=Encoding(),
    figures=(Figure(step=400_000, fid=5.8, sampling=_UNGUIDED),),
    deviations=(*_DEVIATIONS, *_TAP),
    notes=_NOTES,
)
def urepa_l() -> TrainConfig:
    """Train SiT-down-L/2 with U-REPA."""
    return _urepa("SiT-down-L/2", 16, 400_000)


@recipe(
    "urepa-xl-2",
    paper=_PAPER,
    reproduces="SiT↓-XL/2 + U-REPA, without guidance at 400 K steps, with guidance at 1 M and 2 M",
    encoding=Encoding(),
    figures=(
        Figure(step=400_000, fid=5.4, sampling=_UNGUIDED),
        Figure(step=1_000_000, fid=1.48, sampling=_GUIDED),
        Figure(step=2_000_000, fid=1.41, sampling=_GUIDED),
    ),
    deviations=_DEVIATIONS,
    notes=_NOTES,
)
def urepa_xl() -> TrainConfig:
    """Train SiT-down-XL/2 with U-REPA, the paper's main run."""
    return _urepa("SiT-down-XL/2", 18, 2_000_000)


@recipe(
    "sit-down-xl-2",
    paper=_PAPER,
    reproduces="SiT↓-XL/2 without alignment, without guidance",
    encoding=Encoding(encoders=()),
    figures=(
        Figure(step=400_000, fid=9.2, sampling=_UNGUIDED, remark="the paper's steps, as we understand it"),
    ),
    deviations=_DEVIATIONS,
    notes=_NOTES,
)
def sit_down_xl() -> TrainConfig:
    """Train SiT-down-XL/2 alone, what U-REPA's network gives without U-REPA."""
    return trained(method="none", model="SiT-down-XL/2", max_steps=400_000)
