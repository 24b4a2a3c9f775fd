"""The methods by the name that ``--method`` takes, one line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .erw import Erw
from .gmem import Gmem
from .haste import Haste
from .irepa import Irepa
from .none import NoAlignment
from .reg import Reg
from .repa import Repa
from .sra import Sra
from .sra2 import Sra2
from .urepa import Urepa

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .base import Method

METHODS: Mapping[str, type[Method]] = {
    "none": NoAlignment,
    "repa": Repa,
    "haste": Haste,
    "gmem": Gmem,
    "irepa": Irepa,
    "reg": Reg,
    "sra": Sra,
    "sra2": Sra2,
    "urepa": Urepa,
    "erw": Erw,
}
