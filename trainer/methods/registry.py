"""The methods by the name that ``--method`` takes, one line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .haste import Haste
from .none import NoAlignment
from .repa import Repa

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .base import Method

METHODS: Mapping[str, type[Method]] = {
    "none": NoAlignment,
    "repa": Repa,
    "haste": Haste,
}
