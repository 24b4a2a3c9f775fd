"""The methods, which add to the objective's loss, a file each, and the doors for those from outside."""

from __future__ import annotations

from .registry import METHODS

__all__ = ["METHODS"]
