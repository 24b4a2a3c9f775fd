"""A recipe under a configuration file, as ``--recipe`` puts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..trainer.config import NAMED_SECTIONS, RECIPE, SECTIONS, normalised
from ..trainer.methods.outside import find_method
from ..trainer.resuming import flat, on_resume
from .registry import find_recipe

if TYPE_CHECKING:
    from ..trainer.config import TrainConfig


def with_recipe(name: str, file: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the values of a recipe under those of a configuration file.

    Args:
        name: of the recipe.
        file: values of the file, which go before.

    Raises:
        RepaError: the recipe is unknown.
    """
    return {**_overlaid(find_recipe(name).settings(), file or {}), RECIPE: name}


def changed(config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return dotted key → what the recipe says and what the configuration says, where they differ.

    What no computed value depends on is left out, but for the number of steps, and so is the precision that
    a recipe leaves to the machine, where the run says which this was.

    Args:
        config: of a run that began with a recipe.

    Raises:
        RepaError: the recipe is unknown.
    """
    recipe = find_recipe(config.recipe).config()
    if recipe.precision == "auto":
        recipe = replace(recipe, precision=config.precision)
    before, now = (flat(each.to_dict()) for each in (recipe, config))
    return {
        key: (before.get(key), now.get(key))
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key) and (key == "max_steps" or _computed(key, config))
    }


def _computed(key: str, config: TrainConfig) -> bool:
    return on_resume(key, config) != "free" and not key.startswith(("evaluate_", "targets"))


def _overlaid(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return one configuration over another, each section setting by setting."""
    under, over = normalised(under), normalised(over)
    result = {**under, **over}
    for section in SECTIONS:
        below, above = under.get(section), over.get(section)
        if not isinstance(below, Mapping) or not isinstance(above, Mapping):
            continue  # `build` says what is wrong with a section that is no mapping
        if section in NAMED_SECTIONS and above.get("name", below.get("name")) != below.get("name"):
            continue  # settings of another method or objective mean nothing to this one
        kept = dict(below)
        if section == "method" and "preset" in above and above["preset"] != below.get("preset"):
            preset = find_method(below["name"]).named_presets.get(str(above["preset"]), {})
            kept = {key: each for key, each in below.items() if key not in preset}
        result[section] = {**kept, **above}
    return result
