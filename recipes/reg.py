"""REG (Wu et al., arXiv 2507.01467)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Encoding, Figure, Sampling, recipe
from .shared import DRAWS, EPOCH, HALF_PRECISION, trained

if TYPE_CHECKING:
    from ..trainer.config import TrainConfig

_PAPER = "2507.01467"
_GUIDED = Sampling(guidance=2.3, interval=(0.0, 0.85))
_DEVIATIONS = (HALF_PRECISION, DRAWS)


def _reg(model: str, depth: int, max_steps: int) -> TrainConfig:
    return trained(
        method="reg",
        model=model,
        max_steps=max_steps,
        method__encoders="dinov2-b",
        method__depth=depth,
        method__weight=0.5,
        method__cls_weight=0.03,
    )


@recipe(
    "reg-b-2",
    paper=_PAPER,
    reproduces="SiT-B/2 + REG at 400 K steps without guidance",
    encoding=Encoding(),
    figures=(Figure(step=400_000, fid=15.2),),
    deviations=_DEVIATIONS,
)
def reg_b() -> TrainConfig:
    """Train SiT-B/2 with REG."""
    return _reg("SiT-B/2", 4, 400_000)


@recipe(
    "reg-l-2",
    paper=_PAPER,
    reproduces="SiT-L/2 + REG at 100 K and 400 K steps without guidance",
    encoding=Encoding(),
    figures=(Figure(step=100_000, fid=11.4), Figure(step=400_000, fid=4.6)),
    deviations=_DEVIATIONS,
)
def reg_l() -> TrainConfig:
    """Train SiT-L/2 with REG."""
    return _reg("SiT-L/2", 8, 400_000)


@recipe(
    "reg-xl-2",
    paper=_PAPER,
    reproduces="SiT-XL/2 + REG, without guidance from 200 K to 4 M steps, with it from 80 to 800 epochs",
    encoding=Encoding(),
    figures=(
        Figure(step=200_000, fid=5.0),
        Figure(step=400_000, fid=3.4),
        Figure(step=1_000_000, fid=2.7),
        Figure(step=4_000_000, fid=1.8),
        *(
            Figure(step=epochs * EPOCH, fid=fid, sampling=_GUIDED)
            for epochs, fid in ((80, 1.86), (160, 1.59), (480, 1.40), (800, 1.36))
        ),
    ),
    deviations=_DEVIATIONS,
    notes=("Guidance of 2.3 is of the class token too.",),
)
def reg_xl() -> TrainConfig:
    """Train SiT-XL/2 with REG, the paper's main run."""
    return _reg("SiT-XL/2", 8, 800 * EPOCH)


@recipe(
    "reg-xl-2-512",
    paper=_PAPER,
    reproduces="SiT-XL/2 + REG at 512² with guidance, 80 epochs",
    encoding=Encoding(resolution=512),
    figures=(
        Figure(step=80 * EPOCH, fid=1.68, sampling=None, remark="with guidance of a scale we do not know"),
    ),
    deviations=_DEVIATIONS,
)
def reg_xl_512() -> TrainConfig:
    """Train SiT-XL/2 with REG on images of 512²."""
    return _reg("SiT-XL/2", 8, 80 * EPOCH)
