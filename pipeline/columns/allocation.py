"""How many components each head's factors get in int8 and in int4.

The heads of a teacher differ: at equal bytes the worst of them loses several times what the mean does. So
every head gets its own numbers, the same for all images, such that all of them lose alike.

What n₈ and n₄ components cost a head is known from the spectrum σ² of its weighted logits, about, up to a
factor that is measured. Components that are left out cost σ². Of those of a group of n, rotated, each factor
is rounded with steps in proportion to Σσ/n, so the group costs (Σσ)²/n times twice the mean square of
rounding, peak²/(12·L²) of a component whose largest integer is L.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ...data.format.factor_layout import INT4_LARGEST, INT8_LARGEST, FactorLayout, half_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_PEAK = 3.0  # the largest of some hundred normal numbers, in standard deviations
_SCALE_BYTES = 4
_BISECTIONS = 60
_LEAST = 1e-30  # nats, whose logarithm is taken


@dataclass(frozen=True)
class Curve:
    """The best numbers of components of one head, from the fewest bytes to the most.

    Attributes:
        components: (int8, int4), int64 ``[n, 2]``.
        bytes: of queries, keys and scales of an image, int64 ``[n]``, ascending.
        loss: divergence in nats that is expected, float64 ``[n]``, descending.
    """

    components: NDArray[np.int64]
    bytes: NDArray[np.int64]
    loss: NDArray[np.float64]

    def at_most(self, loss: float) -> int:
        """Return the index of the fewest bytes that lose no more, or of the most bytes if none do."""
        return min(int(np.searchsorted(-self.loss, -loss)), len(self.loss) - 1)

    def corrected(self, known: Mapping[int, float]) -> Curve:
        """Return the curve through what was measured, and in between by as much off as there.

        Args:
            known: index → nats.
        """
        if not known:
            return self
        position = -np.log(np.maximum(self.loss, _LEAST))
        indices = sorted(known)
        off = [np.log(max(known[index], _LEAST)) + position[index] for index in indices]
        loss = np.exp(np.interp(position, position[indices], off) - position)
        # what is measured is of some images, and need not fall with every byte
        return replace(self, loss=np.minimum.accumulate(loss))


def head_curve(spectrum: NDArray[np.float64], tokens: int, logit_scale: float) -> Curve:
    """Compute the curve of a head.

    Args:
        spectrum: mean squared singular values of its weighted logits, largest first, float64 ``[Dh]``.
        tokens: T.
        logit_scale: of the teacher.
    """
    width = len(spectrum)
    strength = np.sqrt(spectrum)
    total = np.concatenate([[0.0], np.cumsum(strength)])
    energy = np.concatenate([[0.0], np.cumsum(spectrum)])
    whole, half = (grid.ravel() for grid in np.meshgrid(np.arange(width + 1), np.arange(width + 1)))
    inside = (whole + half >= 1) & (whole + half <= width)
    whole, half = whole[inside], half[inside]
    kept = whole + half
    lost = energy[-1] - energy[kept]
    for count, summed, most in (
        (whole, total[whole], INT8_LARGEST),
        (half, total[kept] - total[whole], INT4_LARGEST),
    ):
        lost = lost + summed**2 / np.maximum(count, 1) * 2 * _PEAK**2 / (12 * most**2)
    # a query and a key: T bytes each of an int8 component, half of them of an int4 one
    cost = 2 * (whole * tokens + half * half_bytes(tokens)) + kept * _SCALE_BYTES
    order = np.lexsort((lost, cost))
    best = np.minimum.accumulate(lost[order])
    # more bytes that lose no less are no choice
    better = np.concatenate([[True], best[1:] < best[:-1]])
    chosen = order[better]
    return Curve(
        components=np.stack([whole, half], axis=1)[chosen].astype(np.int64),
        bytes=cost[chosen].astype(np.int64),
        loss=lost[chosen] * (logit_scale**2 / (2 * tokens)),
    )


class Allocation:
    """Chooses the components of all heads, from their spectra and from what was measured so far.

    Args:
        spectra: of each block and head, float64 ``[L, H, Dh]``, see `head_curve`.
        tokens: T.
        logit_scale: of the teacher.
    """

    def __init__(self, spectra: NDArray[np.float64], tokens: int, logit_scale: float) -> None:
        self._tokens = tokens
        self._shape = spectra.shape[:2]
        heads = spectra.reshape(-1, spectra.shape[-1])
        self._curves = [head_curve(each, tokens, logit_scale) for each in heads]
        self._known: list[dict[int, float]] = [{} for _ in heads]
        self._corrected = self._curves
        self._chosen = [0] * len(heads)

    @property
    def least_bytes(self) -> int:
        """Bytes of an image with one component a head."""
        return int(sum(curve.bytes[0] for curve in self._curves))

    @property
    def layout(self) -> FactorLayout:
        """The components chosen last."""
        pairs = [
            (int(curve.components[index, 0]), int(curve.components[index, 1]))
            for curve, index in zip(self._curves, self._chosen, strict=True)
        ]
        blocks, heads = self._shape
        return FactorLayout(
            tokens=self._tokens,
            components=tuple(tuple(pairs[block * heads : (block + 1) * heads]) for block in range(blocks)),
        )

    def for_loss(self, loss: float) -> int:
        """Choose the fewest bytes with which each head loses about so many nats, and return them.

        A head that loses more with all its components has them all.
        """
        self._chosen = [curve.at_most(loss) for curve in self._corrected]
        return int(sum(curve.bytes[index] for curve, index in zip(self._curves, self._chosen, strict=True)))

    def for_bytes(self, most: int) -> int:
        """Choose the components that lose least in the worst head, of at most so many bytes an image.

        Returns:
            The bytes.
        """
        least, largest = np.maximum(np.stack([curve.loss[[-1, 0]] for curve in self._corrected]), _LEAST).T
        low, high = float(np.log(least.min())) - 1, float(np.log(largest.max())) + 1
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self.for_loss(float(np.exp(middle))) <= most:
                high = middle
            else:
                low = middle
        return self.for_loss(float(np.exp(high)))

    def learn(self, measured: NDArray[np.float64]) -> None:
        """Correct what is expected by what each head lost with the components chosen last.

        Args:
            measured: nats, float64 ``[L, H]``.
        """
        for known, chosen, nats in zip(self._known, self._chosen, measured.ravel(), strict=True):
            known[chosen] = float(nats)
        self._corrected = [
            curve.corrected(known) for curve, known in zip(self._curves, self._known, strict=True)
        ]
