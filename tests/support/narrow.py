"""The demo's backbones as deep as they are, whose blocks presets name, and a quarter as wide."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from repa.trainer.models.mmdit import MMDIT_SIZES
from repa.trainer.models.sit import SIT_SIZES
from repa.trainer.models.sit_down import SIT_DOWN_SIZES

if TYPE_CHECKING:
    import pytest


def make_narrow(patch: pytest.MonkeyPatch) -> None:
    """Make ``SiT-T``, ``SiT-down-T`` and ``MMDiT-6`` narrow, their heads as many as before."""
    patch.setitem(SIT_SIZES, "T", replace(SIT_SIZES["T"], width=32))
    patch.setitem(SIT_DOWN_SIZES, "T", replace(SIT_DOWN_SIZES["T"], width=32, mlp_width=64))
    patch.setitem(MMDIT_SIZES, "6", replace(MMDIT_SIZES["6"], width=96))
