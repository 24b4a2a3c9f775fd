"""The objectives by the name that ``--set objective=`` takes, one line each."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError
from ..typed import from_mapping
from .ddpm import Ddpm
from .flow import Flow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .base import Objective, ObjectiveConfig

OBJECTIVES: dict[str, type[Objective]] = {
    "flow": Flow,
    "ddpm": Ddpm,
}


def name_of(config: ObjectiveConfig) -> str:
    """Return the registry's name of the objective of some settings."""
    return next(name for name, kind in OBJECTIVES.items() if type(config) is kind.config_class)


def make_objective(config: ObjectiveConfig) -> Objective:
    """Return the objective of some settings.

    Raises:
        RepaError: a path or a law of time that there is not.
    """
    return OBJECTIVES[name_of(config)](config)


def to_plain(config: ObjectiveConfig) -> dict[str, Any]:
    """Return the name and the plain settings of an objective, for checkpoints."""
    return {"name": name_of(config), **asdict(config)}


def from_plain(values: Mapping[str, Any]) -> Objective:
    """Return the objective of `to_plain`.

    Raises:
        RepaError: the objective is unknown, or has other settings.
    """
    settings = dict(values)
    name = settings.pop("name", None)
    if name not in OBJECTIVES:
        raise RepaError(f"objective {name!r} is unknown", f"this repa has {', '.join(OBJECTIVES)}")
    kind = OBJECTIVES[name]
    return kind(from_mapping(kind.config_class, settings, prefix="objective."))
