"""ERW (arXiv 2504.10188), whose paper counts the steps after the warm-up alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Encoding, Figure, recipe
from .shared import DRAWS, EPOCH, HALF_PRECISION, trained

if TYPE_CHECKING:
    from ..trainer.config import TrainConfig

_PAPER = "2504.10188"
_WARMUP = 100_000
_COUNTED = "The paper leaves the steps of the warm-up out of its count. Here they are in it."
_DEVIATIONS = (
    HALF_PRECISION,
    DRAWS,
    _COUNTED,
    "The released code cannot train as it is, see docs/methods/erw.md. Its warm-up has a gradient for one "
    "sample of a batch. Here every sample has one.",
    "The released code has rotary positions from the end of the warm-up on. Here they are there from the "
    "first step.",
)
_ROPE = "The paper tells nothing of rotary positions; --set rope=false leaves them out."
_GUIDED = "guidance 1.62 on an interval that is not published"
_NO_NUMBER = "No number is published with it that is without doubt of these settings."


def _erw(model: str, max_steps: int, preset: str = "paper", **settings: Any) -> TrainConfig:
    return trained(
        method="erw",
        model=model,
        max_steps=max_steps,
        rope=True,
        method__preset=preset,
        method__encoders="dinov2-b",
        method__projector_width=2048,
        **settings,
    )


@recipe(
    "erw-b-2",
    paper=_PAPER,
    reproduces="SiT-B/2 + ERW, blocks 1 to 8 warmed up, without guidance 50 K steps after the warm-up",
    encoding=Encoding(),
    figures=(Figure(step=_WARMUP + 50_000, fid=51.7, remark="captions of the same paper say 54.2 and 55.6"),),
    deviations=_DEVIATIONS,
    notes=(_ROPE, "How long B warms up and which block is aligned afterwards is not told, and ours."),
)
def erw_b() -> TrainConfig:
    """Train SiT-B/2 with ERW."""
    return _erw("SiT-B/2", _WARMUP + 50_000, method__warmup_depth=8, method__depth=10)


@recipe(
    "erw-xl-2",
    paper=_PAPER,
    reproduces="SiT-XL/2 + ERW, without guidance 50 K and 100 K steps after the warm-up, with guidance 200 "
    "and 350 epochs after it",
    encoding=Encoding(),
    figures=(
        Figure(step=_WARMUP + 50_000, fid=25.0),
        Figure(step=_WARMUP + 100_000, fid=12.1),
        Figure(step=_WARMUP + 200 * EPOCH, fid=1.64, sampling=None, remark=_GUIDED),
        Figure(step=_WARMUP + 350 * EPOCH, fid=1.41, sampling=None, remark=_GUIDED),
    ),
    deviations=_DEVIATIONS,
    notes=(
        _ROPE,
        "How fast λ falls is not told in the paper. The half-life is the released code's, in images.",
    ),
)
def erw_xl() -> TrainConfig:
    """Train SiT-XL/2 with ERW, the paper's main run."""
    return _erw("SiT-XL/2", _WARMUP + 350 * EPOCH, method__warmup_depth=5, method__depth=18)


@recipe(
    "erw-xl-2-released",
    paper=_PAPER,
    reproduces="the defaults of the released code",
    encoding=Encoding(),
    deviations=_DEVIATIONS,
    notes=(_NO_NUMBER,),
)
def erw_xl_released() -> TrainConfig:
    """Train SiT-XL/2 with ERW as the released code's defaults say."""
    return _erw("SiT-XL/2", 400_000, "released")


@recipe(
    "erw-xl-2-readme",
    paper=_PAPER,
    reproduces="the command of the README of the released code",
    encoding=Encoding(),
    deviations=_DEVIATIONS,
    notes=(_NO_NUMBER,),
)
def erw_xl_readme() -> TrainConfig:
    """Train SiT-XL/2 with ERW as the README of the released code says."""
    return _erw("SiT-XL/2", 300_000, "readme")
