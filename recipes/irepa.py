"""iREPA (arXiv 2512.10794)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Encoding, Figure, recipe
from .shared import DRAWS, HALF_PRECISION, trained

if TYPE_CHECKING:
    from ..trainer.config import TrainConfig

_PAPER = "2512.10794"
_DEVIATIONS = (
    HALF_PRECISION,
    DRAWS,
    "The released code has the mean and deviation of latents in a file. Here they are measured on the cache.",
)
_GUIDED = "guidance 2.0, its interval is not known"


def _irepa(model: str, max_steps: int, encoder: str = "dinov2-b", **settings: Any) -> TrainConfig:
    return trained(
        method="irepa",
        model=model,
        max_steps=max_steps,
        latent_norm="channel",
        method__encoders=encoder,
        method__depth=4 if model == "SiT-B/2" else 8,
        method__weight=1.0,
        method__gamma=0.6,
        **settings,
    )


@recipe(
    "irepa-b-2",
    paper=_PAPER,
    reproduces="SiT-B/2 + iREPA with DINOv2-B at 400 K steps without guidance",
    encoding=Encoding(),
    figures=(Figure(step=400_000, fid=21.40),),
    deviations=_DEVIATIONS,
)
def irepa_b() -> TrainConfig:
    """Train SiT-B/2 with iREPA."""
    return _irepa("SiT-B/2", 400_000, method__kernel=3)


@recipe(
    "irepa-xl-2",
    paper=_PAPER,
    reproduces="SiT-XL/2 + iREPA with DINOv2-B at 100 K and 400 K steps",
    encoding=Encoding(),
    figures=(
        Figure(step=100_000, fid=16.96),
        Figure(step=400_000, fid=7.52),
        Figure(step=400_000, fid=1.93, sampling=None, remark=_GUIDED),
    ),
    deviations=_DEVIATIONS,
)
def irepa_xl() -> TrainConfig:
    """Train SiT-XL/2 with iREPA."""
    return _irepa("SiT-XL/2", 400_000, method__kernel=3)


@recipe(
    "irepa-xl-2-dinov3",
    paper=_PAPER,
    reproduces="SiT-XL/2 + iREPA with DINOv3-B at 100 K and 400 K steps without guidance",
    encoding=Encoding(encoders=("dinov3-b",)),
    figures=(Figure(step=100_000, fid=16.26), Figure(step=400_000, fid=7.13)),
    deviations=_DEVIATIONS,
)
def irepa_xl_dinov3() -> TrainConfig:
    """Train SiT-XL/2 with iREPA and the teacher DINOv3-B."""
    return _irepa("SiT-XL/2", 400_000, "dinov3-b", method__kernel=3)


@recipe(
    "irepa-xl-2-released",
    paper=_PAPER,
    reproduces="the released configuration for latents as it is",
    encoding=Encoding(),
    deviations=_DEVIATIONS,
    notes=(
        "That configuration names no kernel, and its default of 1 makes the convolution a linear map of each "
        "token. The paper says 3. Which one its numbers are of is not known.",
    ),
)
def irepa_xl_released() -> TrainConfig:
    """Train SiT-XL/2 with iREPA as released, whose kernel is 1."""
    return _irepa("SiT-XL/2", 400_000, method__preset="released")
