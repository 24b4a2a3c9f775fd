"""SRA (arXiv 2505.02831), its later form with two times (arXiv 2607.02508), and SRA 2 (arXiv 2601.17830)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import STABLE_DIFFUSION_VAE, Encoding, Figure, Sampling, recipe
from .shared import DRAWS, EPOCH, HALF_PRECISION, trained

if TYPE_CHECKING:
    from ..trainer.config import TrainConfig

_PAPER, _TWO_TIMES, _SRA2 = "2505.02831", "2607.02508", "2601.17830"
_LATENTS, _LATENTS_512 = Encoding(encoders=()), Encoding(encoders=(), resolution=512)
_VAE = STABLE_DIFFUSION_VAE.replace("-mse", "-ema")
_UNGUIDED = Sampling(vae=_VAE)
_GUIDED = Sampling(guidance=1.8, interval=(0.0, 0.7), vae=_VAE)
_DEVIATIONS = (
    HALF_PRECISION,
    DRAWS,
    "The released program averages another network on every device but the first. Here the average is one.",
)
_NOT_OF_A_TABLE = "read off a plot"
_OF_512 = "guidance 2.5 on an interval that is not published"
_NO_NUMBER = "No number is published with it."
_BLOCKS = {"SiT-B/2": (3, 8), "SiT-L/2": (6, 16), "SiT-XL/2": (8, 20)}


def _sra(model: str, max_steps: int, preset: str = "paper", **settings: Any) -> TrainConfig:
    student, teacher = _BLOCKS[model]
    return trained(
        method="sra",
        model=model,
        max_steps=max_steps,
        method__preset=preset,
        method__student_block=student,
        method__teacher_block=teacher,
        method__offset=0.2,
        **settings,
    )


@recipe(
    "sra-b-2",
    paper=_PAPER,
    reproduces="SiT-B/2 + SRA, blocks 3 → 8, at 400 K steps without guidance",
    encoding=_LATENTS,
    figures=(Figure(step=400_000, fid=29.10, inception_score=50.20, sampling=_UNGUIDED),),
    deviations=_DEVIATIONS,
)
def sra_b() -> TrainConfig:
    """Train SiT-B/2 with SRA."""
    return _sra("SiT-B/2", 400_000)


@recipe(
    "sra-l-2",
    paper=_PAPER,
    reproduces="SiT-L/2 + SRA at 400 K steps without guidance",
    encoding=_LATENTS,
    figures=(Figure(step=400_000, fid=14.3, sampling=_UNGUIDED, remark=_NOT_OF_A_TABLE),),
    deviations=_DEVIATIONS,
)
def sra_l() -> TrainConfig:
    """Train SiT-L/2 with SRA."""
    return _sra("SiT-L/2", 400_000)


@recipe(
    "sra-xl-2",
    paper=_PAPER,
    reproduces="SiT-XL/2 + SRA, without guidance at 400 K steps, with guidance at 400 and 800 epochs",
    encoding=_LATENTS,
    figures=(
        Figure(step=400_000, fid=11.9, sampling=_UNGUIDED, remark=_NOT_OF_A_TABLE),
        Figure(step=400 * EPOCH, fid=1.85, inception_score=297.2, sampling=_GUIDED),
        Figure(step=800 * EPOCH, fid=1.58, inception_score=311.4, sampling=_GUIDED),
    ),
    deviations=_DEVIATIONS,
)
def sra_xl() -> TrainConfig:
    """Train SiT-XL/2 with SRA, the paper's main run."""
    return _sra("SiT-XL/2", 800 * EPOCH)


@recipe(
    "sra-xl-2-512",
    paper=_PAPER,
    reproduces="SiT-XL/2 + SRA at 512² with guidance, 200 and 400 epochs",
    encoding=_LATENTS_512,
    figures=(
        Figure(step=200 * EPOCH, fid=2.17, inception_score=279.3, sampling=None, remark=_OF_512),
        Figure(step=400 * EPOCH, fid=2.07, inception_score=302.2, sampling=None, remark=_OF_512),
    ),
    deviations=_DEVIATIONS,
)
def sra_xl_512() -> TrainConfig:
    """Train SiT-XL/2 with SRA on images of 512², whose weight falls from epoch 99 on."""
    return _sra("SiT-XL/2", 400 * EPOCH, method__decay_after=99, method__decay_epochs=800)


@recipe(
    "sra-b-2-released",
    paper=_PAPER,
    reproduces="the loss of the code since July 2026, on one time",
    encoding=_LATENTS,
    deviations=_DEVIATIONS,
    notes=(_NO_NUMBER, "The cosine is over the tokens of a channel, surely not as it was meant."),
)
def sra_b_released() -> TrainConfig:
    """Train SiT-B/2 with SRA and the loss of the later code."""
    return _sra("SiT-B/2", 400_000, "released")


@recipe(
    "sra-b-2-channel",
    paper=_PAPER,
    reproduces="equation 5 of the paper with a weight of ours",
    encoding=_LATENTS,
    deviations=_DEVIATIONS,
    notes=(_NO_NUMBER,),
)
def sra_b_channel() -> TrainConfig:
    """Train SiT-B/2 with SRA and the cosine over channels, as the paper's equation writes it."""
    return _sra("SiT-B/2", 400_000, "channel")


@recipe(
    "sra-b-2-dts-as",
    paper=_TWO_TIMES,
    reproduces="SiT-B/2 with two times and separated attention, FID of 10,000 samples at 800 K steps",
    encoding=_LATENTS,
    figures=(
        Figure(
            step=800_000,
            fid=25.06,
            sampling=Sampling(num=10_000, vae=_VAE),
            remark="an FID of 10,000 samples",
        ),
    ),
    deviations=(
        *_DEVIATIONS,
        "The released teacher gets labels that are not dropped. Here it gets the student's.",
    ),
)
def sra_b_two_times() -> TrainConfig:
    """Train SiT-B/2 with SRA at two times in one image."""
    return _sra("SiT-B/2", 800_000, "dts_as")


@recipe(
    "sra-xl-2-dts-as",
    paper=_TWO_TIMES,
    reproduces="SiT-XL/2 with two times and separated attention, with guidance at 4 M steps",
    encoding=_LATENTS,
    figures=(
        Figure(
            step=4_000_000,
            fid=1.44,
            inception_score=315.3,
            sampling=None,
            remark="with guidance of a scale we do not know",
        ),
    ),
    deviations=(
        *_DEVIATIONS,
        "The released teacher gets labels that are not dropped. Here it gets the student's.",
    ),
)
def sra_xl_two_times() -> TrainConfig:
    """Train SiT-XL/2 with SRA at two times in one image."""
    return _sra("SiT-XL/2", 4_000_000, "dts_as")


@recipe(
    "sra2-b-2",
    paper=_SRA2,
    reproduces="SiT-B/2 + SRA 2 at 400 K steps without guidance",
    encoding=_LATENTS,
    figures=(Figure(step=400_000, fid=28.89),),
    deviations=("No code is published. The method is our reading of the paper, see docs/methods/sra2.md.",),
)
def sra2_b() -> TrainConfig:
    """Train SiT-B/2 with our reading of SRA 2."""
    return trained(method="sra2", model="SiT-B/2", max_steps=400_000, method__depth=2, method__weight=1.0)


@recipe(
    "sra2-xl-2",
    paper=_SRA2,
    reproduces="SiT-XL/2 + SRA 2 with guidance at 800 epochs",
    encoding=_LATENTS,
    figures=(
        Figure(step=800 * EPOCH, fid=1.52, sampling=None, remark="with guidance of a scale we do not know"),
    ),
    deviations=("No code is published. The method is our reading of the paper, see docs/methods/sra2.md.",),
)
def sra2_xl() -> TrainConfig:
    """Train SiT-XL/2 with our reading of SRA 2."""
    return trained(
        method="sra2", model="SiT-XL/2", max_steps=800 * EPOCH, method__depth=8, method__weight=1.0
    )
