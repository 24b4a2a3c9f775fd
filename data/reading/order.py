"""The order of images as pure functions of (seed, epoch, step), for any number of ranks and threads.

An *epoch* is the images of ``count // batch_size`` whole batches of one permutation. Batches never cross an
epoch: the ``count % batch_size`` images at the end of its permutation are left out, others in every epoch.

State is one integer, the images seen. The step is ``images_seen // batch_size``, and its rows are those of
(seed, step) alone. When a run is resumed with another batch size its images seen may be no multiple of the
new one: the step rounds down, and from there on the order is that of a run that always had the new batch
size. In the epoch of the change, and only there, an image may therefore be seen twice or not at all.

Positions are indices into the rows that the trainer was given, not rows of the cache. Up to `SORTED_UP_TO` of
them a permutation is kept in memory, beyond it is computed; ``order=blocks`` keeps to a few shards at a time
(see `permutations`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from ..errors import RepaError
from ..units import counted
from .permutations import (
    CAPTION_STREAM,
    VIEW_STREAM,
    BlockPermutation,
    FeistelPermutation,
    Permutation,
    SortedPermutation,
    philox_words,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

ORDERS = ("full", "blocks")
IntegerT = TypeVar("IntegerT", bound=np.integer[Any])

# 67 million images: half a gigabyte of permutation, and some seconds to sort it at the start of an epoch
SORTED_UP_TO = 2**26


class Cursor(NamedTuple):
    """Where a run stands.

    Attributes:
        step: global batches before this one.
        epoch: epochs before this one.
        batch: batches of this epoch before this one.
    """

    step: int
    epoch: int
    batch: int


def cursor_of(images_seen: int, *, batch_size: int, count: int) -> Cursor:
    """Compute the epoch, and the batch in it, of the batch that comes after ``images_seen`` images.

    Args:
        images_seen: images of all global batches before it.
        batch_size: images of a global batch.
        count: images that there are.

    Raises:
        RepaError: a batch is larger than the image set, or a number is out of range.
    """
    if batch_size < 1:
        raise RepaError(f"batch size {batch_size} is not at least 1", "set --batch-size")
    if batch_size > count:
        raise RepaError(
            f"a batch of {counted(batch_size, 'image')} is larger than the "
            f"{counted(count, 'image')} to train on",
            f"set --batch-size to at most {count}, or cache more images",
        )
    if images_seen < 0:
        raise RepaError(f"images seen cannot be {images_seen}", "the state of the loader is damaged")
    step = images_seen // batch_size
    epoch, batch = divmod(step, count // batch_size)
    return Cursor(step, epoch, batch)


def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Compute the full order of an epoch, ``int64 [count]``, with every position once."""
    return _full(seed, epoch, count).slice(0, count)


def batch_views(*, seed: int, step: int, batch_size: int, views: int) -> NDArray[np.int64]:
    """Draw the view of each image of a global batch, ``int64 [batch_size]``.

    One draw serves all its columns.
    """
    if views == 1:
        return np.zeros(batch_size, dtype=np.int64)
    return (philox_words(seed, step, VIEW_STREAM, batch_size) % np.uint64(views)).astype(np.int64)


def batch_captions(*, seed: int, step: int, batch_size: int) -> NDArray[np.uint64]:
    """Draw a random word for each image of a global batch, which chooses its caption, ``[batch_size]``."""
    return philox_words(seed, step, CAPTION_STREAM, batch_size)


class EpochOrder:
    """The global batches of a run. It keeps the permutation of the epoch it was last asked for.

    Args:
        seed: seed of the run, 0 … 2⁶⁴−1.
        count: images that there are.
        blocks: first position of each block, and the count: what `block_starts` gives, for ``order=blocks``;
            None is the full permutation.
    """

    def __init__(self, *, seed: int, count: int, blocks: NDArray[np.int64] | None = None) -> None:
        self.seed = seed
        self.count = count
        self._blocks = blocks
        self._epoch = -1
        self._permutation: Permutation | None = None

    def batch(self, images_seen: int, batch_size: int) -> NDArray[np.int64]:
        """Return positions of the global batch that follows ``images_seen`` images, ``int64 [batch_size]``.

        A function of the arguments and of nothing that was asked for before.

        Raises:
            RepaError: as `cursor_of`.
        """
        cursor = cursor_of(images_seen, batch_size=batch_size, count=self.count)
        if self._permutation is None or cursor.epoch != self._epoch:
            # let go of the last one first: two would not fit where one does
            self._permutation = None
            self._permutation = (
                _full(self.seed, cursor.epoch, self.count)
                if self._blocks is None
                else BlockPermutation(self.seed, cursor.epoch, self._blocks)
            )
            self._epoch = cursor.epoch
        start = cursor.batch * batch_size
        return self._permutation.slice(start, start + batch_size)


def block_starts(rows: NDArray[np.int64], shard_rows: int) -> NDArray[np.int64]:
    """Count where the positions of each shard begin, and how many there are, ``int64 [shards+1]``.

    Args:
        rows: rows to train on, ascending.
        shard_rows: rows of a shard; shards of which no row is trained on have no block.
    """
    changes = np.flatnonzero(np.diff(rows // shard_rows)) + 1
    return np.concatenate([[0], changes, [len(rows)]]).astype(np.int64)


def rank_slice(batch: NDArray[IntegerT], rank: int, world: int) -> NDArray[IntegerT]:
    """Take the share of a global batch that belongs to one of ``world`` equal ranks.

    Shares are consecutive, in order of the ranks.

    Raises:
        RepaError: the batch is no multiple of the ranks.
    """
    if not 0 <= rank < world:
        raise RepaError(f"rank {rank} is not one of {world} ranks")
    size, rest = divmod(len(batch), world)
    if rest:
        raise RepaError(
            f"a batch of {counted(len(batch), 'image')} does not divide into {counted(world, 'equal share')}",
            f"set --batch-size to a multiple of {world}",
        )
    return batch[rank * size : (rank + 1) * size]


def split_holdout(valid_rows: NDArray[np.int64], holdout: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows into those to train on and those held out of training, both in the order given.

    The held-out rows lie evenly: number i is row ``(2i+1)·n // 2h`` of n rows for h held out. A source is
    sorted by class, so each class gives its share.

    Raises:
        RepaError: nothing would be left to train on.
    """
    count = len(valid_rows)
    if holdout < 0 or (holdout and holdout >= count):
        raise RepaError(
            f"{counted(holdout, 'image')} cannot be held out of the {count} valid ones",
            f"hold out between 0 and {max(count - 1, 0)}",
        )
    if not holdout:
        return valid_rows, valid_rows[:0]
    held = np.zeros(count, dtype=bool)
    held[(2 * np.arange(holdout, dtype=np.int64) + 1) * count // (2 * holdout)] = True
    return valid_rows[~held], valid_rows[held]


def _full(seed: int, epoch: int, count: int) -> Permutation:
    kind = SortedPermutation if count <= SORTED_UP_TO else FeistelPermutation
    return kind(seed, epoch, count)
