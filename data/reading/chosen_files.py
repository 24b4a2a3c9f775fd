"""How the rows of a cache are read: from a bucket, through the page cache, or past it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CacheError, RepaError
from ..storage.bucket import CachePath, RemotePath
from ..storage.direct import (
    PROBE_ROWS,
    PROBES,
    DirectFiles,
    direct_is_faster,
    fits_in_memory,
    supports_direct,
)
from ..storage.local import BufferedFiles
from ..storage.remote_files import RemoteFiles
from .column_reader import places_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from ..storage.local import ShardFiles
    from .column_reader import ColumnReader


def chosen_files(
    path: CachePath,
    readers: Mapping[str, ColumnReader],
    column_bytes: Mapping[str, int],
    valid_rows: NDArray[np.int64],
    *,
    direct: str,
    max_open_files: int,
    threads: int,
) -> ShardFiles:
    """Return where the bytes of rows come from.

    Args:
        path: of the cache.
        readers: of its columns.
        column_bytes: bytes of each column's files.
        valid_rows: rows that have data.
        direct: ``on``, ``off`` or ``auto``, see `CacheReader`.
        max_open_files: shard files held open.
        threads: that will read.

    Raises:
        RepaError: ``direct`` is on, and the file system has no direct reads.
    """
    if isinstance(path, RemotePath):
        return RemoteFiles(path.bucket)
    buffered = BufferedFiles(max_open_files)
    if direct == "off" or not readers or not len(valid_rows):
        return buffered
    # measured on the column of the largest rows, where most of the time goes
    reader = max(readers.values(), key=lambda each: each.spec.row_bytes)
    supported = supports_direct(reader.shard_path(0))
    if direct == "on" and not supported:
        raise RepaError(f"the file system of {path} has no direct reads (O_DIRECT)", "leave direct=on out")
    if not supported or (direct == "auto" and fits_in_memory(sum(column_bytes.values()))):
        return buffered
    past = DirectFiles(max_open_files)
    if direct == "on":
        return past
    # drawn anew in each process: rows of an earlier probe may be in the page cache, and would look fast
    rows = np.random.default_rng().choice(valid_rows, (PROBES, PROBE_ROWS))
    try:
        # beforehand, so that neither way is charged for reading the indexes
        for row in rows.ravel().tolist():
            reader.load_index(buffered, row)
        with ThreadPoolExecutor(threads) as pool:
            faster = direct_is_faster(
                lambda number: _probe(reader, buffered, rows[number], pool, threads),
                lambda number: _probe(reader, past, rows[number], pool, threads),
            )
    except (CacheError, OSError):
        # not an error of the probe: whoever asks for that row is told what is wrong with it
        return buffered
    return past if faster else buffered


def _probe(
    reader: ColumnReader, files: ShardFiles, rows: NDArray[np.int64], pool: Executor, threads: int
) -> None:
    """Read rows of the first view to nowhere, a share for each thread."""

    def read(share: NDArray[np.int64]) -> None:
        memory = memoryview(bytearray(len(share) * reader.row_bytes))
        places = places_of(reader.manifest, share, np.zeros_like(share), np.arange(len(share)))
        reads = reader.start(files, places, memory)
        reads.take_ready()
        reads.wait()

    list(pool.map(read, np.array_split(rows, min(threads, len(rows)))))
