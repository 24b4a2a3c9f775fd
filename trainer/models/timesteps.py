"""The thousand steps of a diffusion chain, on the time of all objectives from data at 0 to noise at 1.

Step i has the time from i / 1000 to (i + 1) / 1000, and stands for all of it: networks and objectives that
count steps are given times as all others, so nobody else knows of steps.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Times = TypeVar("Times", Tensor, float)

STEPS = 1000


def step_of(t: Tensor) -> Tensor:
    """Return the step of each time, int64 from 0 to 999.

    Args:
        t: times in [0, 1], of any shape.
    """
    return (t * STEPS).floor().long().clamp(0, STEPS - 1)


def time_of(step: Times) -> Times:
    """Return the middle of the time of each step, from which `step_of` makes the step again.

    Args:
        step: one step, or floating-point numbers of any shape.
    """
    return (step + 0.5) / STEPS
