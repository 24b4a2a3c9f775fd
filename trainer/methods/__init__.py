"""What is added to the objective's loss: a file for each method, and the doors for those from outside."""

from __future__ import annotations

from .registry import METHODS

__all__ = ["METHODS"]
