"""The learning rate as a function of the step alone, so that a resumed run needs no state of a scheduler."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of an optimiser step, counted from 0.

    With w warm-up steps of N in all it is lr·(step + 1)/w before step w, and after that, with
    p = (step − w)/(N − w), lr, lr·(1 − p) or lr·½(1 + cos πp) (Loshchilov & Hutter, arXiv 1608.03983, eq. 5).
    """
    warmup, whole = config.lr_warmup, config.max_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.lr
    passed = min((step - warmup) / max(whole - warmup, 1), 1.0)
    if config.lr_schedule == "linear":
        return config.lr * (1 - passed)
    return config.lr * (1 + math.cos(math.pi * passed)) / 2


def is_constant(config: TrainConfig) -> bool:
    """Return whether every step has the same learning rate, which needs no column of metrics."""
    return config.lr_schedule == "constant" and not config.lr_warmup
