"""Whether the page cache of a machine, or else its disk, gives its ranks what a training reads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from crc32c import crc32c

from ...data.machine import reading_threads
from ...data.storage.files import create_file, os_errors
from ...data.units import counted, human_bytes, human_rate
from .disk import SCRATCH_NAME, scratch_bytes_of
from .together import Alone, Place, Share, Stopwatch, processes

if TYPE_CHECKING:
    from pathlib import Path

_HELD = 32  # rows of a thread's buffer, as of the batches of a loader
_PIECE = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """What a training reads and what there is to read it from.

    Attributes:
        images: of the image set.
        bytes: of all rows that a training may read.
        row_bytes: that a training image reads.
        memory: bytes that can be had on this machine; None where that is not known.
        cached: bytes a second that all ranks read from the page cache.
        disk: bytes a second of the disk, read in random rows.
        needed: images a second of the training; None where that is not known.
        ranks: that read on this machine.
        as_float: whether tokens are stored in more than int8.
    """

    images: int
    bytes: int
    row_bytes: int
    memory: int | None
    cached: float
    disk: float
    needed: float | None
    ranks: int
    as_float: bool = False

    @property
    def kept(self) -> int | None:
        """Bytes of them that memory may keep beside the training, half of what can be had."""
        return None if self.memory is None else self.memory // 2

    @property
    def fits(self) -> bool:
        """Whether memory keeps them all."""
        return self.kept is not None and self.bytes <= self.kept

    @property
    def given(self) -> float:
        """Images a second that can be read, once an epoch was."""
        return (self.cached if self.fits else self.disk) / self.row_bytes

    @property
    def suffices(self) -> bool | None:
        """Whether that is as many as the training needs, None where its need is not known."""
        return None if self.needed is None else self.given >= self.needed


def verdict(found: Feeding) -> str:
    """Say in one line whether page cache or disk feeds the training, and what to do where neither does."""
    ranks = counted(found.ranks, "rank")
    whole = f"the rows of {counted(found.images, 'image', ',')} take {human_bytes(found.bytes)}"
    if found.fits:
        assert found.kept is not None
        line = (
            f"{whole} and fit in the {human_bytes(found.kept)} that files may take of memory: after the "
            f"first epoch the page cache feeds {ranks} at {human_rate(found.given)}"
        )
        if found.needed is None:
            return line
        line += f", {_share(found.given / found.needed)} what is needed"
        if not found.suffices:
            return f"{line}; {_remedies(found, disk=False)}"
        first = found.disk / found.row_bytes / found.needed
        return line if first >= 1 else f"{line}; in the first the disk gives {first:.0%} of it"
    kept = (
        "how much memory there is is not known"
        if found.kept is None
        else (f"files may take {human_bytes(found.kept)} of memory")
    )
    line = f"{whole} and {kept}: the disk feeds {ranks}"
    if found.needed is None:
        return f"{line} at {human_rate(found.given)}"
    needed = human_bytes(found.needed * found.row_bytes)
    must = f"{line} and must give {needed}/s; it gives {human_bytes(found.disk)}/s"
    return must if found.suffices else f"{must}; {_remedies(found, disk=True)}"


def _share(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio >= 1 else f"{ratio:.0%} of"


def _remedies(found: Feeding, *, disk: bool) -> str:
    """Return what makes the need smaller or the supply larger."""
    ways = ["int8 tokens (--feature-dtype int8)"] if found.as_float else []
    ways += ["a faster disk, more memory, whole shards at a time (--set order=blocks)"] if disk else []
    ways += ["more machines, which each read less"]
    return f"take {' or '.join(ways)}"


def measure_page_cache(folder: Path, *, row_bytes: int, ranks: int) -> float | None:
    """Measure the bytes a second that processes read together from the page cache, checksums compared.

    A scratch file is written into the folder and removed; every process reads all of it in random rows.

    Args:
        folder: on a disk that can be written.
        row_bytes: of a piece that is read.
        ranks: processes that read at the same time.

    Returns:
        The bytes of all of them; None when there is no room for a megabyte.

    Raises:
        RepaError: the operating system refuses.
    """
    with os_errors("write", folder):
        total = scratch_bytes_of(folder)
        if not total:
            return None
        path = folder / SCRATCH_NAME
        try:
            with open(create_file(path), "wb") as file:
                for _ in range(0, total, _PIECE):
                    file.write(bytes(_PIECE))
            reading = PageCacheReading(path, max(1, min(row_bytes, total)), total)
            if ranks == 1:
                share = reading(Place(0, 1, Alone()))
                return share.rows * reading.row_bytes / (share.stopped - share.started)
            with processes(ranks, preload=[__name__]) as started:
                return started.measure(reading).rate * reading.row_bytes
        finally:
            with suppress(OSError):
                path.unlink()


@dataclass(frozen=True)
class PageCacheReading:
    """Rows of a file in random order, with the checksum of each, by the threads of a rank.

    Attributes:
        path: of the file.
        row_bytes: of a row.
        total: bytes of the file.
    """

    path: Path
    row_bytes: int
    total: int

    def __call__(self, place: Place) -> Share:
        """Read all of them."""
        threads = reading_threads(None, place.count)
        order = np.random.default_rng(place.number).permutation(self.total // self.row_bytes)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

        def read(rows: list[int], memory: memoryview) -> None:
            for number, row in enumerate(rows):
                start = number % _HELD * self.row_bytes
                out = memory[start : start + self.row_bytes]
                os.preadv(descriptor, [out], row * self.row_bytes)
                crc32c(out)

        try:
            with ThreadPoolExecutor(threads) as pool:
                # written to once: a page that was never touched is made when it is
                buffers = [np.ones(_HELD * self.row_bytes, np.uint8).data for _ in range(threads)]
                shares = [share.tolist() for share in np.array_split(order, threads)]
                with Stopwatch(place) as watch:
                    list(pool.map(read, shares, buffers))
        finally:
            os.close(descriptor)
        return watch.share(len(order))
