"""The order of images that come from tars, each read from its beginning to its end, as a pure function.

In every epoch the tars are shuffled by (seed, epoch), rank r of w takes tars r, r + w, … of them, and the
rows of a rank pass through a shuffle buffer: for each that comes one leaves, drawn by (seed, epoch, rank).
That is less than a permutation: neighbours in a tar stay near one another, and which images share a batch
depends on the number of ranks. Within an epoch no tar is read by two ranks; a rank that is first to begin the
next one may meet another there that has not yet ended this one.

An epoch has as many batches as every rank can fill whatever tars it drew; the rest is left out, other images
in every epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import RepaError
from ..reading.permutations import philox_words, sorted_order
from ..units import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

# words of Philox's counter, apart from those of `permutations`
_TAR_STREAM = 0x746172
_BUFFER_STREAM = 0x627566


def tar_permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Compute the order of an epoch's tars, ``int64 [count]``."""
    return sorted_order(philox_words(seed, epoch, _TAR_STREAM, count))


def steps_of_epoch(counts: NDArray[np.int64], batch_size: int, world: int) -> int:
    """Global batches of an epoch.

    Args:
        counts: rows of each tar, int64 ``[S]``.
        batch_size: images of a global batch, a multiple of ``world``.
        world: number of ranks.

    Raises:
        RepaError: there are fewer tars than ranks, or not one batch for every rank.
    """
    if len(counts) < world:
        raise RepaError(
            f"{counted(len(counts), 'tar')} cannot be shared among {counted(world, 'rank')}",
            "start fewer, or export smaller shards",
        )
    # whatever a rank draws, it has at least this many rows
    least = int(np.sort(counts)[: len(counts) // world].sum())
    steps = least // (batch_size // world)
    if not steps:
        raise RepaError(
            f"a batch of {counted(batch_size, 'image')} is larger than what {counted(world, 'rank')} can be "
            f"sure of among {counted(int(counts.sum()), 'image')} in {counted(len(counts), 'tar')} "
            f"({least} each)",
            "set a smaller --batch-size",
        )
    return steps


def buffered_order(seed: int, epoch: int, rank: int, count: int, buffer: int) -> NDArray[np.int64]:
    """Compute in which order rows leave a shuffle buffer.

    Args:
        seed: of the run.
        epoch: epoch.
        rank: rank.
        count: rows that come.
        buffer: rows that the buffer holds; 1 keeps their order.

    Returns:
        int64 ``[count]``, each of 0 … count−1 once; number k is below k + ``buffer``.
    """
    buffer = min(buffer, count)
    draws = philox_words(seed, epoch, _BUFFER_STREAM, count, substream=rank)
    slots = list(range(buffer))
    order = []
    for coming, slot in zip(
        range(buffer, count), (draws[: count - buffer] % np.uint64(max(buffer, 1))).tolist(), strict=True
    ):
        order.append(slots[slot])
        slots[slot] = coming
    # the buffer is emptied in the order of the last draws
    last = sorted_order(draws[count - buffer :])
    return np.array([*order, *np.array(slots, dtype=np.int64)[last]], dtype=np.int64)
