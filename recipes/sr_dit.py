"""SR-DiT, the speedrun diffusion transformer (Bhanded, arXiv 2512.12386), as far as this repa has its parts.

It is REG on SiT-B/1 and an autoencoder of 32 channels, and a list of additions. What it begins with can be
had in full. Of the additions token routing, value residuals and the contrastive term are not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Encoding, Figure, recipe
from .shared import DRAWS, trained

if TYPE_CHECKING:
    from ..trainer.config import TrainConfig

_PAPER = "2512.12386"
# what REPA-E (arXiv 2504.10483) made of INVAE, in the form of diffusers; latents [32, 16, 16] of a 256² image
_ENCODING = Encoding(vae="REPA-E/e2e-invae-hf", channels=32, stride=16)
_SCALE = 0.3099
_ONE_DRAW = (
    "The released code draws a latent of each image once and keeps it. Here the posterior is kept, and a "
    "latent is drawn of it in every step."
)
_DEVIATIONS = (_ONE_DRAW, DRAWS)
_VAE = (
    "The released code loads e2e-invae; that this is what the paper's tables call INVAE is our reading. Its "
    "latents are multiplied by 0.3099."
)


def _sr_dit(depth: int, **settings: Any) -> TrainConfig:
    return trained(
        method="reg",
        model="SiT-B/1",
        max_steps=400_000,
        # the one factor, and no statistics that the autoencoder's configuration may have
        latent_norm="sd",
        latent_scale=_SCALE,
        method__encoders="dinov2-b",
        method__depth=depth,
        method__weight=0.5,
        method__cls_weight=0.03,
        **settings,
    )


@recipe(
    "sr-dit-baseline",
    paper=_PAPER,
    reproduces="what SR-DiT begins with, SiT-B/1 + REG on INVAE at 400 K steps without guidance",
    encoding=_ENCODING,
    figures=(
        Figure(
            step=400_000,
            fid=10.56,
            inception_score=104.5,
            remark="of the author's log of results, with sFID 5.49, precision 0.69, recall 0.63",
        ),
    ),
    deviations=_DEVIATIONS,
    notes=(_VAE,),
)
def sr_dit_baseline() -> TrainConfig:
    """Train SiT-B/1 with REG on latents of 16×16 and 32 channels, from which SR-DiT sets out."""
    return _sr_dit(4)


@recipe(
    "sr-dit",
    paper=_PAPER,
    reproduces="SR-DiT-B/1 without its token routing, value residuals and contrastive term",
    encoding=_ENCODING,
    deviations=(
        *_DEVIATIONS,
        "The paper routes tokens (SPRINT): its middle eight blocks see a random quarter of them in training, "
        "and in one step of twenty are passed by. Here all blocks see all tokens, and a step costs more.",
        "The paper mixes the values of the first block into those of the others. Here they are not mixed.",
        "The paper subtracts 0.05 times the error to another image's velocity. Here there is no such term.",
        "The RMSNorm of tokens has a gain here, and none there.",
    ),
    notes=(
        "The paper's FID of 3.49 (IS 221.2 by the author's log) is of all parts, with balanced labels and "
        "250 stochastic steps without guidance. Do not expect it of this recipe: no number is published of "
        "these parts alone.",
        "Times are shifted by the square root of 8,192 / 4,096, the numbers of a latent and those of the "
        "paper's base; objective.shift is its inverse.",
        "The block that is aligned is the paper's, after which its routing begins.",
        _VAE,
    ),
)
def sr_dit() -> TrainConfig:
    """Train SiT-B/1 with REG, rotary positions, RMSNorm, normalised queries and keys, and shifted times."""
    return _sr_dit(2, rope=True, rms_norm=True, qk_norm=True, objective__shift=0.5**0.5)
