"""How well images fit their prompts, as CLIP sees it (CLIPScore, arXiv 2104.08718, without its factor)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .moments import as_rows

if TYPE_CHECKING:
    from .moments import Rows


def clip_score(images: Rows, texts: Rows) -> dict[str, float]:
    """Return the mean of 100 · max(cos(image, text), 0), and that mean's standard deviation.

    Args:
        images: embeddings of the images ``[N, D]``, of any length.
        texts: embeddings of their prompts ``[N, D]``, in the same order.

    Returns:
        ``clip_score``, and ``clip_score_deviation``, the deviation of the terms over the root of N.
    """
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in map(as_rows, (images, texts))]
    scores = 100 * np.maximum((unit[0] * unit[1]).sum(axis=1), 0)
    return {
        "clip_score": float(scores.mean()),
        "clip_score_deviation": float(scores.std() / np.sqrt(len(scores))),
    }
