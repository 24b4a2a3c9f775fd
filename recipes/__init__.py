"""Published settings as Python functions, each tagged with the numbers that it is to reproduce."""

from .registry import RECIPES, find_recipe

__all__ = ["RECIPES", "find_recipe"]
