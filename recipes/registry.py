"""The recipes by the name that ``--recipe`` takes, one line a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.edge import shortened
from ..data.errors import RepaError
from ..trainer.typed import nearest
from . import dit, erw, gmem, haste, irepa, lightningdit, mmdit, reg, repa, sit, sr_dit, sra, urepa
from .base import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

_FILES = (sr_dit, sit, repa, haste, irepa, reg, urepa, sra, erw, dit, lightningdit, gmem, mmdit)

RECIPES: Mapping[str, Recipe] = {
    each.name: each for file in _FILES for each in vars(file).values() if isinstance(each, Recipe)
}


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name.

    Raises:
        RepaError: the name is unknown; the remedy has those nearest to it.
    """
    if name not in RECIPES:
        shown = shortened(name)
        raise RepaError(f"recipe {shown} is unknown", nearest(shown, RECIPES), field="--recipe")
    return RECIPES[name]
