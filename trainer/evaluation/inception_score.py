"""Inception score, with the splits of either published program."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import RepaError
from .moments import as_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .moments import Rows


def inception_score(logits: Rows, *, split_size: int = 5000) -> dict[str, float]:
    """Compute the inception score over splits in the order of the samples.

    exp(mean KL(p(y|x) ‖ mean p(y|x))) a split, averaged over splits (Salimans et al., arXiv 1606.03498),
    as the ADM evaluation suite splits. The last split is shorter where the size does not divide N.

    Args:
        logits: ``[N, C]`` of the classifier, without its bias as in both published programs.
        split_size: images in a split.

    Returns:
        ``is`` and ``is_deviation``, the standard deviation over splits (divided by their number).

    Raises:
        RepaError: the logits are not ``[N, C]`` or not finite, or a split would be empty.
    """
    if split_size < 1:
        raise RepaError(f"a split of {split_size} images is empty", "take at least 1", field="split_size")
    rows = as_rows(logits)
    return _over_splits([rows[start : start + split_size] for start in range(0, len(rows), split_size)])


def inception_score_shuffled(logits: Rows, *, splits: int = 10, seed: int = 2020) -> dict[str, float]:
    """Compute the inception score over splits of shuffled samples.

    The splits of torch-fidelity 0.4: ``splits`` parts, as even as they can be, of a permutation by numpy's
    ``RandomState``.

    Args:
        logits: ``[N, C]`` of the classifier, without its bias as in both published programs.
        splits: how many.
        seed: of the permutation.

    Returns:
        ``is`` and ``is_deviation``, the standard deviation over splits (divided by their number).

    Raises:
        RepaError: the logits are not ``[N, C]`` or not finite, or a split would be empty.
    """
    rows = as_rows(logits)
    if not 1 <= splits <= len(rows):
        raise RepaError(
            f"{len(rows)} images do not make {splits} splits",
            f"take 1 to {len(rows)} splits",
            field="splits",
        )
    rows = rows[np.random.RandomState(seed).permutation(len(rows))]
    edges = [i * len(rows) // splits for i in range(splits + 1)]
    return _over_splits([rows[start:stop] for start, stop in pairwise(edges)])


def _over_splits(parts: list[NDArray[np.float64]]) -> dict[str, float]:
    scores = np.array([_score(part) for part in parts])
    return {"is": float(scores.mean()), "is_deviation": float(scores.std())}


def _score(logits: NDArray[np.float64]) -> float:
    """Return exp of the mean divergence from the marginal over the rows."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    # a class that no image has at all contributes 0·log 0, which is 0
    marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
    return float(np.exp((p * (log_p - marginal)).sum(axis=1).mean()))
