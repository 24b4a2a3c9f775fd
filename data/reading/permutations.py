"""Permutations of ``0 … count−1`` that are pure functions of (seed, epoch, count), read slice by slice.

Three of them: one that is sorted out in memory; one that is computed, for counts that would not fit; and one
that keeps to a few shards at a time. All draw from the counter-based generator Philox 4×64 with key
(seed, epoch) (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). NumPy promises the
words of a bit generator for ever, but not what its ``permutation`` makes of them, so that part is ours.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import RepaError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# the last word of Philox's 256-bit counter keeps the streams of one key apart
ORDER_STREAM = 0
VIEW_STREAM = 1
ROUND_STREAM = 2
BLOCK_STREAM = 3
WINDOW_STREAM = 4
CAPTION_STREAM = 5

WINDOW_BLOCKS = 4

_ROUNDS = 8


class Permutation(Protocol):
    """An order of ``0 … count−1``."""

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return what comes at positions ``start … stop−1``, ``int64 [stop−start]``."""
        ...


class SortedPermutation:
    """The positions sorted by words of Philox, at 8 bytes an image.

    The sort is stable, so that equal words have one order.

    Args:
        seed: seed of the run, 0 … 2⁶⁴−1.
        epoch: number of the epoch.
        count: N.

    Raises:
        RepaError: the seed is out of range.
    """

    def __init__(self, seed: int, epoch: int, count: int) -> None:
        self.order = sorted_order(philox_words(seed, epoch, ORDER_STREAM, count))

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return what comes at positions ``start … stop−1``, ``int64 [stop−start]``."""
        return self.order[start:stop]


class FeistelPermutation:
    """A pseudo-random permutation that is computed where it is read, in the same small memory for any count.

    A position is a pair of digits (x mod a, x div a) with a·b ≥ count, both about √count; each of eight
    rounds adds a hash of one digit to the other, which can be undone. What falls outside ``0 … count−1`` is
    permuted again until it does not (*cycle walking*); with these digits that is one position in √count at
    most. Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, methods 2 and 3;
    the hash is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with a key a round.

    It is for counts that are large: of the permutations of two or three positions it reaches few.

    Args:
        seed: seed of the run, 0 … 2⁶⁴−1.
        epoch: number of the epoch.
        count: N, at least 1.

    Raises:
        RepaError: the seed is out of range.
    """

    def __init__(self, seed: int, epoch: int, count: int) -> None:
        self.count = count
        low = isqrt(count - 1) + 1
        self._low, self._high = np.uint64(low), np.uint64(-(-count // low))
        self._keys = philox_words(seed, epoch, ROUND_STREAM, _ROUNDS)

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return what comes at positions ``start … stop−1``, ``int64 [stop−start]``."""
        values = self._rounds(np.arange(start, stop, dtype=np.uint64))
        outside = np.flatnonzero(values >= self.count)
        while len(outside):
            values[outside] = self._rounds(values[outside])
            outside = outside[values[outside] >= self.count]
        return values.astype(np.int64)

    def _rounds(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low, high = values % self._low, values // self._low
        for number, key in enumerate(self._keys):
            if number % 2:
                high = (high + _mixed(low ^ key) % self._high) % self._high
            else:
                low = (low + _mixed(high ^ key) % self._low) % self._low
        return high * self._low + low


class BlockPermutation:
    """Whole blocks of neighbours in random order, shuffled together a few at a time.

    For disks that are slow at random offsets: at any time only `WINDOW_BLOCKS` blocks are read. Neighbours of
    a block are likelier to meet in a batch than in a full permutation, and in a source sorted by class they
    are of one class.

    Args:
        seed: seed of the run, 0 … 2⁶⁴−1.
        epoch: number of the epoch.
        starts: first position of each block, ascending from 0, and then the count, ``int64 [blocks+1]``.

    Raises:
        RepaError: the seed is out of range.
    """

    def __init__(self, seed: int, epoch: int, starts: NDArray[np.int64]) -> None:
        self._key = (seed, epoch)
        self._starts = starts
        self._blocks = sorted_order(philox_words(seed, epoch, BLOCK_STREAM, len(starts) - 1))
        sizes = np.diff(starts)[self._blocks]
        firsts = range(0, len(sizes), WINDOW_BLOCKS)
        # positions before each window, and all of them
        self._before = np.concatenate([[0], np.cumsum(np.add.reduceat(sizes, firsts))]).astype(np.int64)
        self._window = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return what comes at positions ``start … stop−1``, ``int64 [stop−start]``."""
        parts = []
        while start < stop:
            window = int(np.searchsorted(self._before, start, side="right")) - 1
            first, end = int(self._before[window]), min(stop, int(self._before[window + 1]))
            parts.append(self._shuffled(window)[start - first : end - first])
            start = end
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _shuffled(self, window: int) -> NDArray[np.int64]:
        if window != self._window:
            blocks = self._blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
            positions = np.concatenate(
                [np.arange(*self._starts[block : block + 2]) for block in blocks.tolist()]
            )
            words = philox_words(*self._key, WINDOW_STREAM, len(positions), substream=window)
            self._window, self._order = window, positions[sorted_order(words)]
        return self._order


def philox_words(seed: int, key: int, stream: int, count: int, *, substream: int = 0) -> NDArray[np.uint64]:
    """Draw ``count`` words of Philox with key (seed, key), of one of its streams.

    Raises:
        RepaError: the seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise RepaError(f"seed {seed} is not between 0 and 2⁶⁴−1", "set --seed")
    generator = np.random.Philox(
        key=np.array([seed, key], dtype=np.uint64),
        counter=np.array([0, 0, substream, stream], dtype=np.uint64),
    )
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


def sorted_order(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the positions of words in ascending order, equal words as they come."""
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64, modulo 2⁶⁴."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
