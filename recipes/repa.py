"""REPA (Yu et al., arXiv 2410.06940)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Encoding, Figure, Sampling, recipe
from .shared import DRAWS, EPOCH, HALF_PRECISION, trained

if TYPE_CHECKING:
    from ..trainer.config import TrainConfig

_PAPER = "2410.06940"
_GUIDED = Sampling(guidance=1.8, interval=(0.0, 0.7))
_DEVIATIONS = (HALF_PRECISION, DRAWS)


def _repa(model: str, max_steps: int) -> TrainConfig:
    return trained(
        method="repa",
        model=model,
        max_steps=max_steps,
        method__encoders="dinov2-b",
        method__depth=8,
        method__weight=0.5,
        method__projector_width=2048,
    )


@recipe(
    "repa-b-2",
    paper=_PAPER,
    reproduces="SiT-B/2 + REPA at 400 K steps without guidance",
    encoding=Encoding(),
    figures=(Figure(step=400_000, fid=24.4, remark="others reproduce 22.8 to 27.3"),),
    deviations=_DEVIATIONS,
    notes=("The authors later found block 4 better for B: --set method.depth=4.",),
)
def repa_b() -> TrainConfig:
    """Train SiT-B/2 with REPA."""
    return _repa("SiT-B/2", 400_000)


@recipe(
    "repa-l-2",
    paper=_PAPER,
    reproduces="SiT-L/2 + REPA without guidance",
    encoding=Encoding(),
    figures=(Figure(step=400_000, fid=9.7), Figure(step=700_000, fid=8.4)),
    deviations=_DEVIATIONS,
)
def repa_l() -> TrainConfig:
    """Train SiT-L/2 with REPA."""
    return _repa("SiT-L/2", 700_000)


@recipe(
    "repa-xl-2",
    paper=_PAPER,
    reproduces="SiT-XL/2 + REPA, without guidance from 150 K to 4 M steps, with guidance at 800 epochs",
    encoding=Encoding(),
    figures=(
        Figure(step=150_000, fid=13.6),
        Figure(step=400_000, fid=7.9),
        Figure(step=1_000_000, fid=6.4),
        Figure(step=4_000_000, fid=5.9),
        Figure(step=800 * EPOCH, fid=1.42, sampling=_GUIDED),
    ),
    deviations=_DEVIATIONS,
)
def repa_xl() -> TrainConfig:
    """Train SiT-XL/2 with REPA, the paper's main run."""
    return _repa("SiT-XL/2", 4_000_000)


@recipe(
    "repa-xl-2-512",
    paper=_PAPER,
    reproduces="SiT-XL/2 + REPA at 512² with guidance, 80 to 200 epochs",
    encoding=Encoding(resolution=512),
    figures=tuple(
        Figure(step=epochs * EPOCH, fid=fid, inception_score=score, sampling=Sampling(guidance=1.35))
        for epochs, fid, score in ((80, 2.44, None), (100, 2.32, None), (200, 2.08, 274.6))
    ),
    deviations=_DEVIATIONS,
    notes=("The guidance of 1.35 is read second-hand.",),
)
def repa_xl_512() -> TrainConfig:
    """Train SiT-XL/2 with REPA on images of 512², whose teacher sees 448²."""
    return _repa("SiT-XL/2", 200 * EPOCH)
