"""Means of the training values between two rows of metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Reduce = Callable[[Tensor], Tensor]


class Means:
    """Means over steps, kept on the device until somebody asks. A step is never waited for.

    Values are added one by one in float64 in the order of the steps, so that the mean does not depend on when
    they were fetched, and a resumed run writes the row that the undisturbed one would have written.
    """

    def __init__(self) -> None:
        self._pending: dict[str, list[Tensor]] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a scalar of this step. A tensor stays on its device for now."""
        self._sums.setdefault(name, 0.0)
        if isinstance(value, Tensor):
            self._pending.setdefault(name, []).append(value.detach())
            return
        self._sums[name] += value
        self._counts[name] = self._counts.get(name, 0) + 1

    def fetch(self, reduce: Reduce | None = None) -> None:
        """Move what is pending into the sums. With several ranks `reduce` averages a vector over them."""
        if not self._pending:
            return
        names = list(self._pending)
        vector = torch.stack([value.float() for name in names for value in self._pending[name]])
        numbers = iter((vector if reduce is None else reduce(vector)).tolist())
        for name in names:
            for _ in self._pending[name]:
                self._sums[name] += next(numbers)
            self._counts[name] = self._counts.get(name, 0) + len(self._pending[name])
        self._pending.clear()

    def take(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Return the means since the last call, by name in order of first appearance."""
        self.fetch(reduce)
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return sums and counts. `fetch` must have been called."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._pending.clear()
        self._sums = dict(state["sums"])
        self._counts = dict(state["counts"])
