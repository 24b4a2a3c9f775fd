"""The methods, by the name that ``--method`` takes: one line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .haste import Haste, HasteConfig
from .none import NoAlignment, NoneConfig
from .repa import Repa, RepaConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .base import Method, MethodConfig

METHODS: Mapping[str, tuple[type[MethodConfig], type[Method]]] = {
    "none": (NoneConfig, NoAlignment),
    "repa": (RepaConfig, Repa),
    "haste": (HasteConfig, Haste),
}
