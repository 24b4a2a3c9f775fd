"""Rows of a bank as coefficients in a basis, by a singular value decomposition that sees a slab at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray

Slabs: TypeAlias = Callable[[], Iterable[NDArray[Any]]]
"""Reads all rows from the first to the last, floats ``[n, D]`` at a time, each time it is called."""

_LEAST = 1e-6
"""Part of the first singular value below which a direction is rounding."""
_MOST_RANK = 10**12


@dataclass(frozen=True, kw_only=True)
class FactoredSaid:
    """How far a factored bank is from the vectors it was made of, as it is stored.

    Attributes:
        rank: d, vectors kept of the basis.
        relative: root of the summed squared error, relative to that of the rows around their mean.
        cosine_mean: mean over the rows of 1 − cos(row, decoded row), which is what a condition sees.
        cosine_most: largest of them.
    """

    rank: Annotated[int, Ge(1), Le(_MOST_RANK)]
    relative: Annotated[float, Ge(0)]
    cosine_mean: float
    cosine_most: float


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What rows have in common, row i being C_i·Mᵀ + m (thin SVD S − m = U·Σ·Vᵀ, C = U·√Σ).

    Attributes:
        mean: m ``[D]``.
        basis: M = V·√Σ, ``[D, d]``.
        singular_values: Σ, ``[d]``, descending.
    """

    mean: NDArray[Any]
    basis: NDArray[Any]
    singular_values: NDArray[Any]

    def decoded(self, coefficients: NDArray[Any]) -> NDArray[Any]:
        """Return the vectors ``[n, D]`` of coefficients ``[n, d]``."""
        decoded: NDArray[Any] = coefficients @ self.basis.T + self.mean
        return decoded

    def encoded(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Return coefficients ``[n, d]`` of vectors ``[n, D]``, C = (s − m)·M / Σ.

        Decoded, it is the orthogonal projection onto the basis.
        """
        values = self.singular_values
        # a direction in which no row lies has no coefficient
        inverse = np.divide(1, values, out=np.zeros_like(values), where=values > _LEAST * values[0])
        coefficients: NDArray[Any] = (vectors - self.mean) @ self.basis * inverse
        return coefficients

    def stored(self) -> Basis:
        """Return it rounded as a file stores it, to float32."""
        return Basis(**{name: np.ascontiguousarray(each, np.float32) for name, each in vars(self).items()})


def basis_of(slabs: Slabs, rank: int) -> Basis:
    """Return the basis of all rows, in float64, reading them once.

    V and Σ are of the rows' scatter matrix ``[D, D]``, so that no more than a slab of rows is in float64.

    Args:
        slabs: the rows, at least one.
        rank: d, from 1 to D.
    """
    count = 0
    near: Any = None
    for slab in slabs():
        rows = slab.astype(np.float64)
        if near is None:
            # the scatter is summed around a point near the mean, as around 0 most of its digits would cancel
            near = rows.mean(axis=0)
            total, scatter = np.zeros_like(near), np.zeros((len(near), len(near)))
        rows -= near
        total += rows.sum(axis=0)
        scatter += rows.T @ rows
        count += len(rows)
    shift = total / count
    squares, vectors = np.linalg.eigh(scatter - count * np.outer(shift, shift))
    singular = np.sqrt(np.maximum(squares[::-1][:rank], 0))
    return Basis(
        mean=near + shift, basis=vectors[:, ::-1][:, :rank] * np.sqrt(singular), singular_values=singular
    )


def coefficients_of(slabs: Slabs, exact: Basis) -> tuple[NDArray[np.float16], FactoredSaid]:
    """Return the coefficients of all rows as a file stores them, and what that changes of the rows.

    Args:
        slabs: the rows.
        exact: their basis, in float64.

    Returns:
        Float16 ``[N, d]``, and the error with the basis of the file.
    """
    stored = exact.stored()
    parts = []
    lost = around = total = most = 0.0
    for slab in slabs():
        rows = slab.astype(np.float64)
        parts.append(exact.encoded(rows).astype(np.float16))
        decoded = stored.decoded(parts[-1].astype(np.float64))
        lost += float(np.square(rows - decoded).sum())
        around += float(np.square(rows - stored.mean).sum())
        norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(decoded, axis=1)
        cosines = np.divide((rows * decoded).sum(axis=1), norms, out=np.zeros_like(norms), where=norms > 0)
        total += float((1 - cosines).sum())
        most = max(most, float((1 - cosines).max()))
    coefficients: NDArray[np.float16] = np.concatenate(parts)
    said = FactoredSaid(
        rank=len(exact.singular_values),
        relative=(lost / around) ** 0.5 if around else 0.0,
        cosine_mean=total / len(coefficients),
        cosine_most=most,
    )
    return coefficients, said
