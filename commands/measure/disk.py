"""The speed of a disk, measured on a scratch file that is read back in random pieces past the page cache."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...data.storage.files import create_file, os_errors

if TYPE_CHECKING:
    from pathlib import Path

SCRATCH_NAME = ".repa-plan.scratch"
_SCRATCH_BYTES = 256_000_000
_SHARE = 0.05  # of the free space, at most
_PIECE = 4_000_000
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class DiskSpeed:
    """Measured once, on a file that was then removed.

    Attributes:
        bytes: of the file.
        write: bytes a second, written one after the other and synced.
        read: bytes a second, read in pieces of a row in random order by eight threads, after the system was
            asked to drop the file from the page cache. It may not have: a RAM disk cannot.
    """

    bytes: int
    write: float
    read: float


def measure_disk(folder: Path, *, row_bytes: int, scratch_bytes: int = _SCRATCH_BYTES) -> DiskSpeed | None:
    """Write a scratch file into a folder, read it back, and remove it.

    Args:
        folder: on the disk that is to be measured.
        row_bytes: of a piece that is read.
        scratch_bytes: of the file, at most a twentieth of what is free.

    Returns:
        The speeds; None when there is no room for a megabyte.

    Raises:
        RepaError: the operating system refuses.
    """
    with os_errors("write", folder):
        total = scratch_bytes_of(folder, scratch_bytes)
        if not total:
            return None
        path = folder / SCRATCH_NAME
        try:
            descriptor = create_file(path, os.O_RDWR)
            try:
                written = _write(descriptor, total)
                read = _read(descriptor, total, max(1, min(row_bytes, total)))
            finally:
                os.close(descriptor)
        finally:
            with suppress(OSError):
                path.unlink()
    return DiskSpeed(bytes=total, write=written, read=read)


def scratch_bytes_of(folder: Path, most: int = _SCRATCH_BYTES) -> int:
    """Return the bytes of a scratch file, at most a twentieth of what is free.

    Args:
        folder: that it goes into.
        most: bytes.
    """
    return min(most, int(shutil.disk_usage(folder).free * _SHARE)) // _PIECE * _PIECE


def _write(descriptor: int, total: int) -> float:
    # noise: some disks compress
    piece = np.random.default_rng(0).bytes(_PIECE)
    started = time.perf_counter()
    for _ in range(0, total, _PIECE):
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
    return total / (time.perf_counter() - started)


def _read(descriptor: int, total: int, row_bytes: int) -> float:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    starts = np.random.default_rng(1).permutation(total // row_bytes) * row_bytes

    def read(share: list[int]) -> int:
        buffer = bytearray(row_bytes)
        return sum(os.preadv(descriptor, [buffer], start) for start in share)

    started = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        count = sum(pool.map(read, [share.tolist() for share in np.array_split(starts, _THREADS)]))
    return count / (time.perf_counter() - started)
