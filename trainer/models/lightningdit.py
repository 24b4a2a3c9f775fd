"""LightningDiT (arXiv 2501.01423), a SiT of newer parts, made for latents with a token for each position."""

from __future__ import annotations

from dataclasses import dataclass

from .sit import SiT, SiTConfig


@dataclass(frozen=True, kw_only=True)
class LightningDiTConfig(SiTConfig):
    """Architecture of a LightningDiT, a SiT with rotary positions, RMSNorm and gated MLP by default."""

    family = "LightningDiT"
    # T is ours, for the demo; S is not published
    letters = ("T", "B", "L", "XL")
    patch_sizes = (1, 2)

    rope: bool = True
    rms_norm: bool = True
    swiglu: bool = True


class LightningDiT(SiT):
    """The transformer of a `LightningDiTConfig`.

    State dict keys are those of LightningDiT but for its tables of cosines and sines, ``feat_rope``. First
    weights are those of LightningDiT, which are those of SiT: Xavier uniform, gains 1, adaLN and output 0.
    """

    config: LightningDiTConfig
