"""Batches for torch, read ahead by threads into memory that is reused, in an order that is a pure function.

There is no producer that could be left behind. Asking for a batch hands the reads of a later one to a pool of
threads and waits for its own; each read is short, so nothing blocks when the consumer stops, and an error is
raised where the batch is asked for, with the traceback of the thread that met it.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CacheError, RepaError
from ..format.columns import LABEL, ColumnSpec
from ..units import counted
from .order import ORDERS, EpochOrder, batch_captions, batch_views, block_starts, cursor_of, rank_slice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray
    from torch import Tensor

    from .order import IntegerT
    from .reader import CacheReader

THREAD_NAME = "repa-loader"
PREFETCH = 2
"""Micro-batches that are being read ahead of the one asked for."""
HELD = 2
"""Micro-batches beside those: the one trained on, and the next, which has come."""


@dataclass
class Batch:
    """One micro-batch of one rank.

    Attributes:
        step: index of the global batch it is of.
        micro: which of the rank's ``accumulate`` micro-batches of that step.
        images_seen: the loader's state once this step is done, images of all ranks.
        rows: rows of the cache, int64 ``[b]``.
        views: view that each row's columns are of, all of them, by its index in the cache, int64 ``[b]``.
        label: classes, int64 ``[b]``.
        columns: column → values ``[b, *shape]`` in the stored dtype.
        captions: rows of the captions that were drawn, int64 ``[b]``; None if no column of captions is read.
    """

    step: int
    micro: int
    images_seen: int
    rows: Tensor
    views: Tensor
    label: Tensor
    columns: dict[str, Tensor]
    captions: Tensor | None = None


class CacheLoader:
    """An iterable of the micro-batches of one rank, from ``images_seen`` on.

    A tensor of a batch may be kept for as long as one likes: its memory is used again only when nothing
    refers to it any more. A consumer that lets go of its batches is served from ``prefetch`` + `HELD` buffers
    per column.

    Iterating again goes on after the last step of which all micro-batches were handed out. That is further
    than what was trained on when somebody in between reads ahead, as Lightning does by one batch if the
    loader has no length: then the state to save is `Batch.images_seen` of the batch trained on last.

    Args:
        reader: where the rows come from.
        rows: rows to train on, int64 ``[M]``, none of them invalid.
        batch_size: images of a global batch, of all ranks and micro-batches together.
        rank: which of the ranks this is.
        world: number of ranks.
        accumulate: micro-batches of a step.
        seed: of the order and of the views.
        view: index of the view to read of every image; None draws one for each.
        order: ``full``, any image anywhere; or ``blocks``, a few shards at a time, for slow disks (see
            `BlockPermutation`); then ``rows`` must ascend.
        images_seen: state to begin with.
        last_image: stop once that many images were seen; never, if None.
        columns_at: step → columns to read for it; ``label`` always comes along.
        threads: threads that read; of a cache in a bucket there are more, which mostly wait.
        prefetch: micro-batches being read ahead of the one asked for.
        pin_memory: read into page-locked memory; without effect where there is no CUDA.

    Raises:
        RepaError: the batch does not divide among ranks and micro-batches, or is larger than the image set.
        CacheError: a row is invalid.
    """

    def __init__(
        self,
        reader: CacheReader,
        *,
        rows: NDArray[np.int64],
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        view: int | None = None,
        order: str = "full",
        images_seen: int = 0,
        last_image: int | None = None,
        columns_at: Callable[[int], Sequence[str]],
        threads: int = 2,
        prefetch: int = PREFETCH,
        pin_memory: bool = False,
    ) -> None:
        cursor_of(images_seen, batch_size=batch_size, count=len(rows))
        micro = counted(accumulate, "micro-batch")
        if world < 1 or accumulate < 1 or not 0 <= rank < world:
            raise RepaError(
                f"rank {rank} of {world} with {micro} is not possible: ranks count from 0, and each takes at "
                "least one"
            )
        if batch_size % (world * accumulate):
            raise RepaError(
                f"a batch of {counted(batch_size, 'image')} does not divide into {counted(world, 'rank')} × "
                f"{micro}",
                f"set --batch-size to a multiple of {world * accumulate}",
            )
        if threads < 1 or prefetch < 1:
            raise RepaError(f"{threads} threads and {prefetch} batches ahead: both must be at least 1")
        if order not in ORDERS:
            raise RepaError(f"order {order!r} is unknown", f"there are {', '.join(ORDERS)}")
        invalid = reader.invalid_rows[np.isin(reader.invalid_rows, rows)]
        if len(invalid):
            raise CacheError(
                f"row {invalid[0]} of cache {reader.path} is invalid", "train on reader.valid_rows"
            )
        self.reader = reader
        self.rows = rows
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.seed = seed
        self.view = view
        self.last_image = last_image
        self.columns_at = columns_at
        self.threads = reader.threads_for(threads)
        self.prefetch = prefetch
        self._images_seen = images_seen
        blocks = block_starts(rows, reader.manifest.shard_rows) if order == "blocks" else None
        self._order = EpochOrder(seed=seed, count=len(rows), blocks=blocks)
        pinned = pin_memory and torch.cuda.is_available()
        self._memory = PinnedMemory() if pinned else RecycledMemory(prefetch + HELD)
        # weak, so that dropping the iterator alone ends its threads
        self._stream: weakref.ref[_Stream] | None = None

    @property
    def images_seen(self) -> int:
        """Images, of all ranks, of the steps whose micro-batches were all handed out."""
        return self._images_seen

    def state_dict(self) -> dict[str, int]:
        """Return all there is to know to go on elsewhere, ``{"images_seen": …}``."""
        return {"images_seen": self._images_seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a state. Iterators from before it end."""
        cursor_of(state["images_seen"], batch_size=self.batch_size, count=len(self.rows))
        self.close()
        self._images_seen = state["images_seen"]

    def __len__(self) -> int:
        """Count the micro-batches from image 0 to the last, wherever this loader begins.

        Lightning counts against it.

        Raises:
            TypeError: there is no last image.
        """
        if self.last_image is None:
            raise TypeError("a loader without a last image has no length")
        return -(-self.last_image // self.batch_size) * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        stream = _Stream(self)
        self._stream = weakref.ref(stream)
        return stream

    def close(self) -> None:
        """End the running iterator and its threads. Iterating again begins anew."""
        stream = self._stream() if self._stream is not None else None
        if stream is not None:
            stream.close()

    def _start(
        self, images_seen: int, micro: int, pool: ThreadPoolExecutor
    ) -> tuple[Batch, list[Future[None]]]:
        """Make a batch, and start the reads that fill it."""
        cursor = cursor_of(images_seen, batch_size=self.batch_size, count=len(self.rows))
        rows = self._mine(self.rows[self._order.batch(images_seen, self.batch_size)], micro)
        views = self._mine(self._views(cursor.step), micro)
        columns = [column for column in dict.fromkeys(self.columns_at(cursor.step)) if column != LABEL]
        self.reader.manifest.require(tuple(columns), where=str(self.reader.path))
        arrays: dict[str, NDArray[Any]] = {}
        tensors: dict[str, Tensor] = {}
        self._memory.keep_only(columns)
        for column in columns:
            spec = self.reader.manifest.columns[column]
            arrays[column], tensors[column] = self._memory.take(column, len(rows), spec)
        table, numbers = self.reader.captions, None
        if table is not None:
            words = batch_captions(seed=self.seed, step=cursor.step, batch_size=self.batch_size)
            numbers = table.numbers(rows, self._mine(words, micro))
        batch = Batch(
            step=cursor.step,
            micro=micro,
            images_seen=images_seen + self.batch_size,
            rows=torch.from_numpy(rows),
            views=torch.from_numpy(views),
            label=torch.from_numpy(self.reader.labels[rows].astype(np.int64)),
            columns=tensors,
            captions=None if table is None else torch.from_numpy(table.rows_of(rows, numbers)),
        )
        reads = self.reader.start_rows(
            rows, columns, arrays, views=views, captions=numbers, pool=pool, parts=self.threads
        )
        return batch, reads

    def _views(self, step: int) -> NDArray[np.int64]:
        """Return the view of each image of the global batch."""
        if self.view is not None:
            return np.full(self.batch_size, self.view, dtype=np.int64)
        views = len(self.reader.manifest.views)
        return batch_views(seed=self.seed, step=step, batch_size=self.batch_size, views=views)

    def _mine(self, values: NDArray[IntegerT], micro: int) -> NDArray[IntegerT]:
        """Take this rank's micro-batch of a value for each image of the global batch."""
        return rank_slice(rank_slice(values, self.rank, self.world), micro, self.accumulate)


class _Stream:
    """One pass over a loader.

    It is a window of batches being read, of which the oldest is the next to hand out.
    """

    def __init__(self, loader: CacheLoader) -> None:
        self._loader = loader
        self._images_seen = loader.images_seen
        self._micro = 0
        self._window: deque[tuple[Batch, list[Future[None]]]] = deque()
        self._pool = ThreadPoolExecutor(loader.threads, thread_name_prefix=THREAD_NAME)
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            self._fill()
            if not self._window:
                raise StopIteration
            batch, reads = self._window.popleft()
            for read in reads:
                read.result()
            # one more is begun now, to be read while the caller computes
            self._fill()
        except BaseException:
            self.close()
            raise
        # only whole steps count, so that nobody resumes within one
        if batch.micro == self._loader.accumulate - 1:
            self._loader._images_seen = batch.images_seen
        return batch

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was not begun, wait for the reads that were, end the threads."""
        self._closed = True
        # the garbage collector may run this in one of the pool's own threads, which cannot wait for itself
        inside = threading.current_thread().name.startswith(THREAD_NAME)
        self._pool.shutdown(wait=not inside, cancel_futures=True)
        self._window.clear()

    def _fill(self) -> None:
        loader = self._loader
        while len(self._window) < loader.prefetch:
            if loader.last_image is not None and self._images_seen >= loader.last_image:
                return
            self._window.append(loader._start(self._images_seen, self._micro, self._pool))
            self._micro += 1
            if self._micro == loader.accumulate:
                self._micro = 0
                self._images_seen += loader.batch_size


class RecycledMemory:
    """Arrays for batches, used again once nobody refers to them.

    A fresh array would cost as much in page faults as the reading itself. Arrays of 4 MiB and more lie on
    huge pages where the kernel gives them to those who ask: NumPy asks. Every array handed out is a new view
    of memory that is kept here. The tensor on it, and whatever shares the tensor's storage (slices, what
    autograd saved, NumPy arrays), keep the view alive; when it dies its memory comes back.

    Args:
        keep: arrays per column kept for use; more are let go.

    Attributes:
        allocated: arrays ever made.
    """

    def __init__(self, keep: int) -> None:
        self.allocated = 0
        self._keep = keep
        self._free: dict[str, deque[NDArray[Any]]] = {}

    def keep_only(self, columns: Sequence[str]) -> None:
        """Let go of the memory of columns that are no longer read."""
        for column in self._free.keys() - set(columns):
            del self._free[column]

    def take(self, column: str, rows: int, spec: ColumnSpec) -> tuple[NDArray[Any], Tensor]:
        """Return an array ``[rows, *shape]`` of arbitrary values, and a tensor on the same memory."""
        free = self._free.setdefault(column, deque(maxlen=self._keep))
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty((rows, *spec.shape), dtype=spec.numpy_dtype)
            self.allocated += 1
        view = memory.view()
        # runs in whatever thread lets go last, at any moment: appending to a deque needs no lock
        weakref.finalize(view, free.append, memory).atexit = False
        return view, torch.from_numpy(view)


class PinnedMemory:
    """Page-locked arrays from torch's own allocator.

    It uses memory again by itself, and not before the copies to the device that were queued from it are done,
    which nothing here could know.
    """

    def keep_only(self, columns: Sequence[str]) -> None:
        """Do nothing, as nothing is kept here."""

    def take(self, column: str, rows: int, spec: ColumnSpec) -> tuple[NDArray[Any], Tensor]:
        """Return an array ``[rows, *shape]`` of arbitrary values, and a tensor on the same memory."""
        tensor = torch.empty((rows, *spec.shape), dtype=getattr(torch, spec.dtype), pin_memory=True)
        return tensor.numpy(), tensor
