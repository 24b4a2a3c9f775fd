"""Decoded and cropped rows, read ahead by worker processes."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import warnings
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ...data.errors import RepaError
from .base import ImageSource, UndecodableImage

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from multiprocessing.process import BaseProcess

    from numpy.typing import NDArray
from .pixels import center_crop_adm

Decoded = tuple[int, "NDArray[np.uint8] | str"]


# messages of torch's loader for a worker that is gone, and of multiprocessing for its pipe, maybe empty
_LOST = re.compile(r"DataLoader worker \(pid|^got end of file during message$|^$")


ROWS_AHEAD = 16  # decoded images waiting per worker: 0.2 MB each at 256², enough to ride over a slow file


def decode_row(images: ImageSource, row: int, resolution: int) -> NDArray[np.uint8] | str:
    """Decode the pixels of a row, cropped.

    Returns:
        uint8 ``[3, R, R]``, or the reason why the image cannot be decoded.

    Raises:
        RepaError: the file cannot be read.
    """
    try:
        return np.ascontiguousarray(center_crop_adm(images.load(row), resolution).transpose(2, 0, 1))
    except UndecodableImage as error:
        return error.reason


@contextmanager
def decode_rows(
    images: ImageSource, rows: Sequence[int], resolution: int, workers: int
) -> Iterator[Iterator[Decoded]]:
    """Decode rows in the order asked for, read ahead by worker processes.

    Give it all rows of all shards at once: workers start once (about as long as importing torch) and read on
    across shards. They come from a fork server, never from a fork of this process, whose threads and CUDA
    context a fork would break; so ``images`` must pickle, and a script must be importable
    (``if __name__ == "__main__":``). An iterator left early is fine: leaving the context ends the workers.

    Args:
        images: the set's.
        rows: rows to decode.
        resolution: side of the crop, R.
        workers: processes; 0 decodes in this one, as it is asked.

    Yields:
        An iterator of (row, uint8 ``[3, R, R]`` or the reason why the image cannot be decoded).

    Raises:
        RepaError: (from the iterator) a file cannot be read, or a worker was killed.
    """
    if workers == 0:
        yield ((row, decode_row(images, row, resolution)) for row in rows)
        return
    iterator = _from_workers(images, rows, resolution, workers)
    try:
        yield iterator
    finally:
        iterator.close()


class _DecodeDataset(Dataset["tuple[int, NDArray[np.uint8] | str | RepaError]"]):
    def __init__(self, images: ImageSource, rows: Sequence[int], resolution: int) -> None:
        self._images = images
        self._rows = np.asarray(rows, dtype=np.int64)
        self._resolution = resolution

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[int, NDArray[np.uint8] | str | RepaError]:
        row = int(self._rows[index])
        try:
            return row, decode_row(self._images, row, self._resolution)
        except RepaError as error:
            # as a value: the loader would wrap an exception's message in the worker's traceback
            return row, RepaError(error.what, error.remedy, field=error.field)


def _keep(item: object) -> object:
    """Return a batch as it is, so that pixels travel through a pipe and not through /dev/shm.

    It is the loader's collate function.
    """
    return item


def _obey_parent(_: int) -> None:
    """Ignore Ctrl-C, which reaches the whole process group, as the parent alone decides.

    Killing the parent ends its workers.

    The loader's own watch does not see the parent's death, since the fork server stands between the two and
    lives as long as any worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _from_workers(
    images: ImageSource, rows: Sequence[int], resolution: int, workers: int
) -> Generator[Decoded, None, None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with warnings.catch_warnings():
        # more workers than cores is the caller's choice: files on a network need it
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            _DecodeDataset(images, rows, resolution),
            batch_size=None,
            num_workers=workers,
            collate_fn=_keep,
            prefetch_factor=ROWS_AHEAD,
            multiprocessing_context=context,
            worker_init_fn=_obey_parent,
            generator=torch.Generator().manual_seed(0),  # else it draws from the global one
        )
        iterator: Any = iter(loader)
    _end_together(iterator)
    try:
        while True:
            lost = False
            try:
                row, decoded = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not _LOST.search(str(error)):
                    raise
                lost = True
            if lost:
                raise RepaError(
                    "a decoding process was ended from outside (out of memory?)",
                    "run the same command again, with fewer --workers if it repeats",
                )
            if isinstance(decoded, RepaError):
                raise decoded
            yield row, decoded
    finally:
        # the loader ends its workers when it is freed; a traceback that holds this frame must not keep them
        del iterator, loader


def _end_together(iterator: Any) -> None:
    """End all of a loader's workers when one of them ends, and with them the pipe that they write to.

    The loader asks whether its workers live only while nothing comes. Of one that is killed in the middle of
    an image it would wait for the rest for ever, and so would the others for their turn to write.
    """
    iterator._worker_result_queue._writer.close()  # this process's copy of their end
    workers = list(iterator._workers)
    threading.Thread(target=_kill_after_the_first, args=(workers,), daemon=True).start()


def _kill_after_the_first(workers: Sequence[BaseProcess]) -> None:
    wait([worker.sentinel for worker in workers])
    for worker in workers:
        worker.kill()
