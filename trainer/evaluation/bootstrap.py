"""How far a number would move with other images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from numpy.typing import NDArray

    from .moments import Rows


def bootstrap_spread(
    compute: Callable[[Rows], float], rows: Rows, *, rounds: int = 20, seed: int = 0
) -> float:
    """Return the standard deviation of a number over sets drawn from its images with replacement.

    Efron ("Bootstrap methods", 1979). A set drawn with replacement holds copies, which moves the number
    itself, so that only the spread is returned.

    Args:
        compute: rows ``[N, D]`` → the number.
        rows: of the samples ``[N, D]``.
        rounds: how many sets are drawn.
        seed: of the draws.

    Returns:
        The deviation, divided by ``rounds − 1``.

    Raises:
        RepaError: there are fewer than 2 rounds or no rows.
    """
    if rounds < 2 or len(rows) == 0:
        raise RepaError(
            f"{rounds} rounds over {len(rows)} images have no spread",
            "take at least 2 rounds and some images",
            field="rounds",
        )
    generator = np.random.default_rng(seed)
    values = [compute(_taken(rows, generator.integers(len(rows), size=len(rows)))) for _ in range(rounds)]
    return float(np.std(values, ddof=1))


def _taken(rows: Rows, picks: NDArray[np.int64]) -> NDArray[np.floating] | torch.Tensor:
    return rows[picks]
