"""Linear probe of features, by ridge regression in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import RepaError
from .moments import as_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .moments import Rows


def linear_probe(
    features: Rows,
    labels: NDArray[np.integer],
    held_out: Rows,
    held_out_labels: NDArray[np.integer],
    *,
    penalty: float = 1e-2,
) -> float:
    """Return the share of held-out images whose class a linear map of the features names.

    Features are standardised by the statistics of the fitted set. The map to one target a class, 1 for its
    own and 0 for the others, has the least squared error plus ``penalty · N`` times its squared weights, and
    so has a closed form and no learning rate to tune.

    Args:
        features: of the images that are fitted ``[N, D]``.
        labels: their classes ``[N]``.
        held_out: features of other images ``[M, D]``.
        held_out_labels: their classes ``[M]``.
        penalty: relative to features of deviation 1.

    Raises:
        RepaError: the sets do not fit, there is one class only, or values are not finite.
    """
    rows, others = as_rows(features), as_rows(held_out)
    if rows.shape[1] != others.shape[1] or len(rows) != len(labels) or len(others) != len(held_out_labels):
        raise RepaError(
            f"features {list(rows.shape)} of {len(labels)} labels and {list(others.shape)} of "
            f"{len(held_out_labels)} do not fit",
            "give one label a row, both sets from one model",
            field="labels",
        )
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise RepaError(
            "all images that the probe is fitted to are of one class", "take more images", field="labels"
        )
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    # a channel that never varies says nothing, and would be a division by 0
    deviation = np.where(deviation > 0, deviation, 1.0)
    rows, others = (rows - mean) / deviation, (others - mean) / deviation
    wanted = np.eye(len(classes))[targets]
    prior = wanted.mean(axis=0)
    ridge = penalty * len(rows)
    if len(rows) < rows.shape[1]:  # the same weights through the smaller of the two systems
        weights = rows.T @ np.linalg.solve(rows @ rows.T + ridge * np.eye(len(rows)), wanted - prior)
    else:
        weights = np.linalg.solve(rows.T @ rows + ridge * np.eye(rows.shape[1]), rows.T @ (wanted - prior))
    found = classes[(others @ weights + prior).argmax(axis=1)]
    return float((found == held_out_labels).mean())
