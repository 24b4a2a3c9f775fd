"""Which vectors samples are conditioned on: rows of a bank, and mixtures of two vectors.

One convention holds for every mixture: α is the share of the *second* vector, so that 0 gives the first and 1
the second. (GMem's bank mixes the other way round, its sampling script as here.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.edge import shortened
from ...data.errors import RepaError

MIXTURES = ("linear", "spherical", "concat", "mask")
_ALMOST_PARALLEL = 1e-6


def rows_of_noise(noise: Tensor, frequencies: Tensor) -> Tensor:
    """Return the row of each sample by the mean of its initial noise, the law of GMem's first version.

    The mean of n standard normal numbers is one over √n of another: u = Φ(√n·mean) is uniform, and the row is
    the one in whose share of the cumulated frequencies u falls.

    Args:
        noise: standard normal ``[B, …]``.
        frequencies: weights of the rows ``[N]``, not negative.

    Returns:
        int64 ``[B]``.
    """
    flat = noise.double().flatten(1)
    uniform = torch.special.ndtr(flat.mean(dim=1) * flat.shape[1] ** 0.5)
    cumulated = frequencies.double().cumsum(0)
    rows = torch.searchsorted(cumulated / cumulated[-1], uniform, right=True)
    # of noise whose u is rounded to 1
    return rows.clamp(max=len(frequencies) - 1)


def default_alphas(kind: str) -> tuple[float, ...]:
    """Return the shares that a mixture is shown at, six from 0 to 1 or the one of the released code."""
    return (0.5,) if kind in ("concat", "mask") else (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def mixed(kind: str, first: Tensor, second: Tensor, alphas: Tensor, coins: Tensor | None = None) -> Tensor:
    """Return mixtures of two vectors, at unit length.

    - ``linear``: (1 − α)·a + α·b.
    - ``spherical``: on the arc from a to b, α of the way.
    - ``concat``: the first (1 − α)·D elements of a, the others of b; the released code has α = ½.
    - ``mask``: each element of b where its coin is below α, else of a; the released code has α = ½.

    Args:
        kind: one of `MIXTURES`.
        first: a ``[D]``, at any length.
        second: b ``[D]``.
        alphas: shares of b ``[n]`` in [0, 1].
        coins: uniform numbers ``[n, D]`` in [0, 1), of ``mask``.

    Returns:
        ``[n, D]``.

    Raises:
        RepaError: there is no such mixture.
        ValueError: ``mask`` has no coins.
    """
    a, b = F.normalize(first, dim=0), F.normalize(second, dim=0)
    share = alphas.to(a).unsqueeze(1)
    if kind == "linear":
        found = (1 - share) * a + share * b
    elif kind == "spherical":
        angle = torch.acos((a @ b).clamp(-1, 1))
        # the arc of two vectors that all but coincide is the line between them
        straight = angle < _ALMOST_PARALLEL
        found = (
            (1 - share) * a + share * b
            if straight
            else (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
        )
    elif kind == "concat":
        of_first = ((1 - share) * len(a)).round()
        found = torch.where(torch.arange(len(a)) < of_first, a, b)
    elif kind == "mask":
        if coins is None:
            raise ValueError("a mask needs coins")
        found = torch.where(coins < share, b, a)
    else:
        raise RepaError(
            f"mixture {shortened(kind)} is unknown", f"choose {', '.join(MIXTURES)}", field="--mix"
        )
    return F.normalize(found, dim=1)
