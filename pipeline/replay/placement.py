"""Which rows of a cache a teacher computes together when it is called live, so that the bits are the cache's.

An output is computed from its own image by instructions that depend on the size of the batch and on the
image's position in it, not on the other images. Measured with torch 2.15 on one thread: the AVX-512 and SSE
kernels round alike for any size and position (demo, DINOv2-S and -B, DINOv3-S, SigLIP 2), the AVX2 kernels do
not (demo: in batches of 2, 3 and 7 images some positions differ in the last bits). So `exact` passes put each
row where it stood when the cache was written, into a batch of that size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        size: images of the batch.
        rows: positions, among the rows that were asked for, of those that it computes, int64 ``[n]``.
        positions: their positions in the batch, int64 ``[n]``; the others are zeros.
    """

    size: int
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]


class Placement:
    """Where each row of a cache stood when it was computed. It is the counterpart of `batches.batches`.

    Args:
        valid_rows: rows that could be decoded, int64, ascending.
        shard_rows: rows of a shard.
        batch_size: images of a forward pass.
    """

    def __init__(self, valid_rows: NDArray[np.int64], shard_rows: int, batch_size: int) -> None:
        self._rows = valid_rows
        self._shard_rows = shard_rows
        self._batch_size = batch_size

    def of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the size of the batch that each row was in, and the row's position in it."""
        shards = rows // self._shard_rows
        first, stop = np.searchsorted(
            self._rows, (shards * self._shard_rows, (shards + 1) * self._shard_rows)
        )
        number = np.searchsorted(self._rows, rows) - first
        begun = number - number % self._batch_size
        return np.minimum(stop - first - begun, self._batch_size), number % self._batch_size

    def passes(self, rows: NDArray[np.int64], *, exact: bool) -> Iterator[Pass]:
        """Yield forward passes that compute some rows.

        Args:
            rows: valid rows.
            exact: at the position, in batches of the size, of the time of writing; else one after the other.
        """
        if not exact:
            for start in range(0, len(rows), self._batch_size):
                mine = np.arange(start, min(start + self._batch_size, len(rows)))
                yield Pass(len(mine), mine, mine - start)
            return
        sizes, positions = self.of(rows)
        waiting = np.arange(len(rows))
        while len(waiting):
            size = int(sizes[waiting[0]])
            alike = waiting[sizes[waiting] == size]
            _, first = np.unique(positions[alike], return_index=True)
            taken = alike[first]
            yield Pass(size, taken, positions[taken])
            waiting = np.setdiff1d(waiting, taken)
