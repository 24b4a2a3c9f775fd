"""DiT (Peebles & Xie, arXiv 2212.09748), and what REPA's, HASTE's and SRA's papers trained on it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .base import STABLE_DIFFUSION_VAE, Encoding, Figure, Sampling, recipe
from .shared import DRAWS, EPOCH, HALF_PRECISION, trained_on_steps

if TYPE_CHECKING:
    from ..trainer.config import TrainConfig

_PAPER, _REPA, _HASTE, _SRA = "2212.09748", "2410.06940", "2505.16792", "2505.02831"
# the paper mirrors half of the images
_LATENTS = Encoding(encoders=(), views="flip")
_LATENTS_512 = replace(_LATENTS, resolution=512)
_VAE = STABLE_DIFFUSION_VAE.replace("-mse", "-ema")
_UNGUIDED = Sampling(solver="ddpm", vae=_VAE)
_GUIDED = replace(_UNGUIDED, guidance=1.5, channels="three")
_DEVIATIONS = (DRAWS,)
_NO_CODE = "The paper's code is for SiT alone. What it did on DiT is our reading of it."
_NOT_OF_A_TABLE = "read off a plot"


def _dit(model: str, max_steps: int) -> TrainConfig:
    return trained_on_steps(method="none", model=model, max_steps=max_steps, clip="none")


@recipe(
    "dit-s-2",
    paper=_PAPER,
    reproduces="DiT-S/2 at 400 K steps without guidance",
    encoding=_LATENTS,
    figures=(Figure(step=400_000, fid=68.40, sampling=_UNGUIDED),),
    deviations=_DEVIATIONS,
)
def dit_s() -> TrainConfig:
    """Train DiT-S/2 on the steps of DDPM."""
    return _dit("DiT-S/2", 400_000)


@recipe(
    "dit-b-2",
    paper=_PAPER,
    reproduces="DiT-B/2 at 400 K steps without guidance",
    encoding=_LATENTS,
    figures=(Figure(step=400_000, fid=43.47, sampling=_UNGUIDED),),
    deviations=_DEVIATIONS,
)
def dit_b() -> TrainConfig:
    """Train DiT-B/2 on the steps of DDPM."""
    return _dit("DiT-B/2", 400_000)


@recipe(
    "dit-l-2",
    paper=_PAPER,
    reproduces="DiT-L/2 at 400 K steps without guidance",
    encoding=_LATENTS,
    figures=(Figure(step=400_000, fid=23.33, sampling=_UNGUIDED),),
    deviations=_DEVIATIONS,
)
def dit_l() -> TrainConfig:
    """Train DiT-L/2 on the steps of DDPM."""
    return _dit("DiT-L/2", 400_000)


@recipe(
    "dit-xl-2",
    paper=_PAPER,
    reproduces="DiT-XL/2, without guidance at 400 K and 7 M steps, with guidance at 7 M",
    encoding=_LATENTS,
    figures=(
        Figure(step=400_000, fid=19.47, sampling=_UNGUIDED),
        Figure(step=7_000_000, fid=9.62, inception_score=121.5, sampling=_UNGUIDED),
        Figure(step=7_000_000, fid=3.22, sampling=replace(_GUIDED, guidance=1.25)),
        Figure(step=7_000_000, fid=2.27, inception_score=278.2, sampling=_GUIDED),
    ),
    deviations=_DEVIATIONS,
)
def dit_xl() -> TrainConfig:
    """Train DiT-XL/2 on the steps of DDPM, the paper's main run."""
    return _dit("DiT-XL/2", 7_000_000)


@recipe(
    "dit-xl-2-512",
    paper=_PAPER,
    reproduces="DiT-XL/2 at 512², with guidance at 3 M steps",
    encoding=_LATENTS_512,
    figures=(Figure(step=3_000_000, fid=3.04, inception_score=240.8, sampling=_GUIDED),),
    deviations=_DEVIATIONS,
)
def dit_xl_512() -> TrainConfig:
    """Train DiT-XL/2 on images of 512²."""
    return _dit("DiT-XL/2", 3_000_000)


@recipe(
    "repa-dit-xl-2",
    paper=_REPA,
    reproduces="DiT-XL/2 + REPA without guidance at 400 K and 850 K steps",
    encoding=Encoding(),
    figures=tuple(
        Figure(step=step, fid=fid, sampling=replace(_UNGUIDED, vae=""))
        for step, fid in ((400_000, 12.3), (850_000, 9.6))
    ),
    deviations=(_NO_CODE, HALF_PRECISION, DRAWS),
)
def repa_dit_xl() -> TrainConfig:
    """Train DiT-XL/2 with REPA."""
    return trained_on_steps(
        method="repa",
        model="DiT-XL/2",
        max_steps=850_000,
        method__encoders="dinov2-b",
        method__depth=8,
        method__weight=0.5,
    )


@recipe(
    "haste-dit-xl-2",
    paper=_HASTE,
    reproduces="DiT-XL/2 + HASTE without guidance at 80 epochs",
    encoding=Encoding(attention="9-12"),
    figures=(
        Figure(
            step=80 * EPOCH,
            fid=9.33,
            inception_score=114.3,
            sampling=None,
            remark="without guidance; the paper's table names a solver of velocities, which a DiT has not",
        ),
    ),
    deviations=(_NO_CODE, HALF_PRECISION, DRAWS),
)
def haste_dit_xl() -> TrainConfig:
    """Train DiT-XL/2 with HASTE."""
    return trained_on_steps(
        method="haste",
        model="DiT-XL/2",
        max_steps=80 * EPOCH,
        method__encoders="dinov2-b",
        method__depth=8,
        method__student_blocks="5,6,7,8",
        method__teacher_blocks="9,10,11,12",
        method__weight=0.5,
        method__attention_weight=0.5,
        method__stop=250_000,
    )


@recipe(
    "sra-dit-xl-2",
    paper=_SRA,
    reproduces="DiT-XL/2 + SRA, blocks 8 → 16, without guidance at 400 K and 800 K steps",
    encoding=Encoding(encoders=()),
    figures=(
        Figure(step=400_000, fid=16.5, sampling=_UNGUIDED, remark=_NOT_OF_A_TABLE),
        Figure(step=800_000, fid=12.2, sampling=_UNGUIDED, remark=_NOT_OF_A_TABLE),
    ),
    deviations=(HALF_PRECISION, DRAWS),
    notes=("An issue of the authors' repository shows smooth-L1 diverging on DiT-XL.",),
)
def sra_dit_xl() -> TrainConfig:
    """Train DiT-XL/2 with SRA."""
    return trained_on_steps(
        method="sra",
        model="DiT-XL/2",
        max_steps=800_000,
        method__preset="paper",
        method__student_block=8,
        method__teacher_block=16,
        method__weight=0.04,
        method__offset=0.2,
    )
