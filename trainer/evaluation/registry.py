"""The metrics by name, one line each, with what they are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from .frechet import frechet_distance

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

FEATURES = "features"
"""Features of the samples ``[N, D]``."""
REFERENCE = "reference"
"""Features of the real images ``[M, D]``, from the same model."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that says how good samples are.

    Attributes:
        compute: the arrays that it needs, in their order → the number.
        needs: names of those arrays.
    """

    compute: Callable[..., float]
    needs: tuple[str, ...]


METRICS: dict[str, Metric] = {
    "frechet": Metric(compute=frechet_distance, needs=(FEATURES, REFERENCE)),
}


def measure(name: str, inputs: Mapping[str, NDArray[np.floating]]) -> float:
    """Return a metric of some arrays.

    Args:
        name: of the metric.
        inputs: array names → arrays; more than it needs may be there.

    Raises:
        RepaError: there is no such metric, or it needs an array that is not there.
        ValueError: the arrays do not fit the metric.
    """
    if name not in METRICS:
        raise RepaError(f"metric {name!r} is unknown", f"there are {', '.join(METRICS)}", field=name)
    metric = METRICS[name]
    missing = [each for each in metric.needs if each not in inputs]
    if missing:
        raise RepaError(
            f"metric {name} is computed from {', '.join(metric.needs)}, and there is no {missing[0]}",
            "give it too",
            field=missing[0],
        )
    return metric.compute(*(inputs[each] for each in metric.needs))
