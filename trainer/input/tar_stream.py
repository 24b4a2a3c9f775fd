"""Training batches straight from the tars of an export, for storage that only does sequential reads well.

The order is that of `data.tars.order`. A run that is resumed with as many ranks sees the batches it would
have seen; it reads the tars of the epoch again from the first whose rows it still needs. With another number
of ranks it goes on at the same number of images seen, in an epoch of other batches: within it, an image may
be seen twice or not at all.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import CacheError, RepaError
from ...data.format.columns import LABEL
from ...data.reading.loader import Batch
from ...data.reading.order import batch_views, rank_slice
from ...data.tars.order import buffered_order, steps_of_epoch, tar_permutation
from ...data.units import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ...data.tars.cache import TarCache

    Sample = tuple[int, Mapping[str, NDArray[Any]]]

GUARANTEES = (
    "images come from tars in sequence: tars are shuffled and their rows pass a buffer of {buffer:,}, less "
    "than a permutation; batches depend on the number of devices, and so does what a resumed run sees; "
    "each epoch leaves out {left_out:,} of {images:,} images"
)
_AHEAD = 2  # batches read ahead of the one that is trained on
_PATIENCE = 5.0  # seconds


class TarLoader:
    """An endless iterable of the micro-batches of one rank, from ``images_seen`` on.

    A thread reads; memory is bounded by the buffer and the batches ahead.

    Args:
        cache: the tars.
        batch_size: images of a global batch, of all ranks and micro-batches together.
        columns_at: step → columns to read for it; the label always comes along.
        rank: which of the ranks this is.
        world: number of ranks.
        accumulate: micro-batches of a step.
        seed: of the order and of the views.
        buffer: rows of the shuffle buffer.
        images_seen: state to begin with.
        pin_memory: batches in page-locked memory, where there is CUDA.

    Raises:
        RepaError: the batch does not divide among ranks and micro-batches, or there are too few tars.
    """

    def __init__(
        self,
        cache: TarCache,
        *,
        batch_size: int,
        columns_at: Callable[[int], Sequence[str]],
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        buffer: int = 4096,
        images_seen: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if batch_size % (world * accumulate):
            raise RepaError(
                f"a batch of {counted(batch_size, 'image')} does not divide into {counted(world, 'rank')} "
                f"× {counted(accumulate, 'micro-batch')}",
                f"set --batch-size to a multiple of {world * accumulate}",
            )
        self.cache = cache
        self.batch_size = batch_size
        self.rank, self.world = rank, world
        self.accumulate = accumulate
        self.seed = seed
        self.buffer = buffer
        self.columns_at = columns_at
        self.images_seen = images_seen
        self.epoch_steps = steps_of_epoch(cache.counts, batch_size, world)
        self.pinned = pin_memory and torch.cuda.is_available()
        self._stream: _Stream | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._stream = _Stream(self)
        return self._stream

    def close(self) -> None:
        """End the running iterator and its thread."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _Stream:
    """One pass, with a thread that makes batches and a short queue of them."""

    def __init__(self, loader: TarLoader) -> None:
        self._made: queue.Queue[Batch | BaseException] = queue.Queue(_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(loader, self._made, self._stopped), name="repa-tars", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stopped.is_set():
            raise StopIteration
        made = self._made.get()
        if isinstance(made, BaseException):
            self.close()
            raise made
        return made

    def close(self) -> None:
        self._stopped.set()
        # not longer: a ``pipe:`` command that gives nothing must not hold up the end of a run, and the thread
        # is a daemon, which dies with the process
        self._thread.join(_PATIENCE)


def _produce(loader: TarLoader, made: queue.Queue[Batch | BaseException], stopped: threading.Event) -> None:
    def hand_out(each: Batch | BaseException) -> bool:
        while not stopped.is_set():
            try:
                made.put(each, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    try:
        for batch in _batches(loader, stopped):
            if not hand_out(batch):
                return
    # whatever it is belongs to the training loop, which waits for a batch
    except BaseException as error:
        hand_out(error)


def _batches(loader: TarLoader, stopped: threading.Event) -> Iterator[Batch]:
    """Yield micro-batches of epoch after epoch."""
    epoch, first = divmod(loader.images_seen // loader.batch_size, loader.epoch_steps)
    while True:
        yield from _Epoch(loader, epoch, stopped).batches(first)
        epoch, first = epoch + 1, 0


class _Epoch:
    """The rank's share of an epoch. It knows which tars, and which of their rows stands where."""

    def __init__(self, loader: TarLoader, epoch: int, stopped: threading.Event) -> None:
        cache = loader.cache
        self._loader = loader
        self._stopped = stopped
        self._first_step = epoch * loader.epoch_steps
        self._size = loader.batch_size // loader.world
        self._tars = tar_permutation(loader.seed, epoch, len(cache.counts))[loader.rank :: loader.world]
        bounds = np.concatenate(([0], np.cumsum(cache.counts)))
        rows = [cache.valid_rows[bounds[tar] : bounds[tar + 1]] for tar in self._tars]
        coming = np.concatenate(rows)
        order = buffered_order(loader.seed, epoch, loader.rank, len(coming), loader.buffer)
        self._leaving: NDArray[np.int64] = coming[order]
        # a row's position in the epoch says in which step it is used, hence which columns it is read for
        self._positions = dict(zip(self._leaving.tolist(), range(len(coming)), strict=True))

    def batches(self, first: int) -> Iterator[Batch]:
        """Yield micro-batches from batch ``first`` of the epoch on."""
        held: dict[int, Sample] = {}
        samples = self._samples(first * self._size)
        for batch in range(first, self._loader.epoch_steps):
            rows = self._leaving[batch * self._size : (batch + 1) * self._size]
            for row in rows.tolist():
                # rows come in another order than they are used in: those that are early are held
                while row not in held:
                    coming, sample = next(samples)
                    held[coming] = sample
            step = self._first_step + batch
            for micro in range(self._loader.accumulate):
                yield self._batch(step, micro, rank_slice(rows, micro, self._loader.accumulate), held)

    def _samples(self, start: int) -> Iterator[tuple[int, Sample]]:
        """Yield samples from position ``start`` on, as they come."""
        cache, end = self._loader.cache, self._loader.epoch_steps * self._size
        shard_rows = cache.manifest.shard_rows
        needed = {row // shard_rows for row in self._leaving[start:end].tolist()}

        def columns_of(row: int) -> Sequence[str]:
            if self._stopped.is_set():
                raise _StoppedError
            position = self._positions[row]
            # before the batch that a run resumes with, or past the last whole batch
            if not start <= position < end:
                return ()
            columns = self._loader.columns_at(self._first_step + position // self._size)
            return [name for name in columns if name != LABEL]

        for tar in self._tars.tolist():
            if tar in needed:
                for row, label, arrays in cache.samples(tar, columns_of):
                    if label >= len(cache.manifest.class_names):
                        raise CacheError(
                            f"row {row} of {cache.path} has the label {label}, but it names "
                            f"{counted(len(cache.manifest.class_names), 'class')}",
                            "write and export the cache again",
                        )
                    yield row, (label, arrays)

    def _batch(self, step: int, micro: int, rows: NDArray[np.int64], held: dict[int, Sample]) -> Batch:
        loader = self._loader
        manifest = loader.cache.manifest
        views = rank_slice(
            rank_slice(
                batch_views(
                    seed=loader.seed, step=step, batch_size=loader.batch_size, views=len(manifest.views)
                ),
                loader.rank,
                loader.world,
            ),
            micro,
            loader.accumulate,
        )
        samples = [held.pop(row) for row in rows.tolist()]
        columns = {}
        for name in dict.fromkeys(loader.columns_at(step)):
            if name == LABEL:
                continue
            spec = manifest.columns[name]
            tensor = torch.empty(
                (len(rows), *spec.shape), dtype=getattr(torch, spec.dtype), pin_memory=loader.pinned
            )
            for position, ((_, arrays), view) in enumerate(zip(samples, views.tolist(), strict=True)):
                tensor.numpy()[position] = arrays[name][view]
            columns[name] = tensor
        return Batch(
            step=step,
            micro=micro,
            images_seen=(step + 1) * loader.batch_size,
            rows=torch.from_numpy(rows.copy()),
            views=torch.from_numpy(views.copy()),
            label=torch.tensor([label for label, _ in samples], dtype=torch.int64),
            columns=columns,
        )


class _StoppedError(Exception):
    """Nobody waits for batches any more."""
