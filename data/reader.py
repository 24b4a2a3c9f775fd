"""Rows of a cache straight into the caller's buffers, by threads and ``preadv`` through the shard indexes.

A row and view is one inner chunk of a shard file: its raw bytes and their crc32c. One ``preadv`` puts the
bytes into the caller's array and the checksum beside it; nothing is copied in between. ``preadv`` and the
checksum run without the interpreter's lock, so threads add up.

The chunks of a compressed column take the slow path: read into memory of their own, checked, decoded, copied.
It is the same threads that do it, the codecs run without the lock too, and one batch may mix both.
"""

from __future__ import annotations

import os
import threading
import weakref
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from crc32c import crc32c

from .columns import LABEL, source_of
from .compression import chunk_codec
from .descriptors import DescriptorCache
from .errors import CacheError, CorruptRowError
from .shard_index import CHECKSUM_BYTES, MISSING, read_index
from .store import committed_shards, invalid_rows, open_manifest, read_labels, shard_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from concurrent.futures import Executor, Future

    from numpy.typing import NDArray

    from .compression import ChunkCodec

# in a column's table of chunk offsets: the index gives the chunk no place, or one of the wrong size
_NO_CHUNK = -1
_WRONG_SIZE = -2
_REASONS = {_NO_CHUNK: "its chunk is missing", _WRONG_SIZE: "its chunk has another size"}


class _Target(NamedTuple):
    """Where a column's rows go: the bytes of ``out[column]``, row after row."""

    column: str
    memory: memoryview
    row_bytes: int


class CacheReader:
    """Reads rows of the columns of one cache; safe to share between threads, to fork with and to pickle.

    Starts no threads and opens no shard before the first row is read.

    Args:
        path: folder of the cache.
        columns: the columns that may be read, without ``label``.
        check_crc: compare every row with its checksum.
        max_open_files: shard files held open; more only while more threads than this read at once.

    Attributes:
        manifest: the cache's manifest.
        labels: class of every row, ``int32 [N]``.
        invalid_rows: rows whose image could not be decoded, ascending.
        valid_rows: all others, ascending.

    Raises:
        CacheError: there is no cache, or a column is missing or not completely written; names what is missing
            and the command that adds it.
        RepaError: a column's compressor needs a package that is not installed.
    """

    def __init__(
        self, path: Path | str, columns: Sequence[str], *, check_crc: bool = True, max_open_files: int = 128
    ) -> None:
        self.path = Path(path)
        self.columns = tuple(dict.fromkeys(column for column in columns if column != LABEL))
        self.check_crc = check_crc
        self.max_open_files = max_open_files
        self.manifest = open_manifest(self.path)
        self.manifest.require(self.columns, where=str(self.path))
        self._require_committed()
        self.labels = read_labels(self.path, self.manifest)
        self.invalid_rows = invalid_rows(self.path, self.manifest)
        valid = np.ones(self.manifest.num_rows, dtype=bool)
        valid[self.invalid_rows] = False
        self._valid = valid
        self.valid_rows: NDArray[np.int64] = np.flatnonzero(valid).astype(np.int64, copy=False)
        self._files = DescriptorCache(max_open_files)
        self._paths: dict[tuple[str, int], str] = {}
        self._offsets: dict[str, NDArray[np.int64]] = {}
        self._indexed: dict[str, NDArray[np.bool_]] = {}
        # of compressed columns only: codec, and the table of what their chunks take up
        self._codecs: dict[str, ChunkCodec] = {}
        self._sizes: dict[str, NDArray[np.int64]] = {}
        for column in self.columns:
            rows = self.manifest.num_shards * self.manifest.shard_rows
            self._offsets[column] = np.empty((rows, len(self.manifest.views)), dtype=np.int64)
            self._indexed[column] = np.zeros(self.manifest.num_shards, dtype=bool)
            codec = chunk_codec(self.manifest.columns[column])
            if codec is not None:
                self._codecs[column] = codec
                self._sizes[column] = np.empty_like(self._offsets[column])
        self._bytes_read = dict.fromkeys(self.columns, 0)
        self._lock = threading.Lock()
        _READERS.add(self)

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # a spawned process opens the cache anew; descriptors and locks do not travel
        options = partial(CacheReader, check_crc=self.check_crc, max_open_files=self.max_open_files)
        return options, (self.path, self.columns)

    @property
    def bytes_read(self) -> dict[str, int]:
        """Bytes of rows read so far, without checksums, by column."""
        with self._lock:
            return dict(self._bytes_read)

    def close(self) -> None:
        """Close the shard files; reading afterwards opens them again."""
        self._files.close()

    def read_rows(
        self,
        rows: NDArray[np.int64],
        columns: Sequence[str],
        out: Mapping[str, NDArray[Any]],
        *,
        views: NDArray[np.int64] | None = None,
        pool: Executor | None = None,
        parts: int = 1,
    ) -> None:
        """Read rows into the caller's arrays, in the order asked for.

        Args:
            rows: rows of the cache, ``int64 [B]``.
            columns: columns to read, of those the reader was opened with.
            out: column → C-contiguous array ``[B, *shape]`` of the stored dtype.
            views: view of each row, ``int64 [B]``, the same for all columns; the first view by default.
            pool: runs the parts; the calling thread does without it.
            parts: consecutive parts that the batch is cut into when there is a pool.

        Raises:
            CorruptRowError: stored bytes are missing, cut off or do not match their checksum.
            CacheError: a row is invalid or not of the cache, or a file cannot be read.
            ValueError: an array of ``out`` does not fit.
        """
        if pool is None:
            for task in self._tasks(rows, columns, out, views, 1):
                task()
            return
        futures = self.start_rows(rows, columns, out, views=views, pool=pool, parts=parts)
        wait(futures)
        for future in futures:
            future.result()

    def start_rows(
        self,
        rows: NDArray[np.int64],
        columns: Sequence[str],
        out: Mapping[str, NDArray[Any]],
        *,
        views: NDArray[np.int64] | None = None,
        pool: Executor,
        parts: int = 1,
    ) -> list[Future[None]]:
        """Like `read_rows`, but returns at once: ``out`` is filled when every future is done.

        Errors of the arguments are raised here, those of the files by the futures.
        """
        return [pool.submit(task) for task in self._tasks(rows, columns, out, views, parts)]

    def _tasks(
        self,
        rows: NDArray[np.int64],
        columns: Sequence[str],
        out: Mapping[str, NDArray[Any]],
        views: NDArray[np.int64] | None,
        parts: int,
    ) -> Iterator[partial[None]]:
        """Calls that together read a batch, each for consecutive rows of it in the order of the files."""
        self._check_rows(rows, views)
        targets = [self._target(column, len(rows), out) for column in columns if column != LABEL]
        order = np.argsort(rows, kind="stable")
        for places in np.array_split(order, max(1, min(parts, len(rows)))):
            part_views = np.zeros(len(places), dtype=np.int64) if views is None else views[places]
            yield partial(self._read_part, rows[places], part_views, places, targets)

    def _read_part(
        self,
        rows: NDArray[np.int64],
        views: NDArray[np.int64],
        places: NDArray[np.intp],
        targets: Sequence[_Target],
    ) -> None:
        """Read ascending rows of all columns into the given places of the targets."""
        if not len(rows):
            return
        shards = rows // self.manifest.shard_rows
        cuts = np.flatnonzero(np.diff(shards)) + 1
        starts = [0, *cuts.tolist()]
        stops = [*cuts.tolist(), len(rows)]
        for target in targets:
            for start, stop in zip(starts, stops, strict=True):
                run = slice(start, stop)
                self._read_run(target, int(shards[start]), rows[run], views[run], places[run])
        with self._lock:
            for target in targets:
                self._bytes_read[target.column] += target.row_bytes * len(rows)

    def _read_run(
        self,
        target: _Target,
        shard: int,
        rows: NDArray[np.int64],
        views: NDArray[np.int64],
        places: NDArray[np.intp],
    ) -> None:
        """Read rows of one shard of one column."""
        column, memory, row_bytes = target
        path = self._path(column, shard)
        row = int(rows[0])
        scratch = memoryview(bytearray(CHECKSUM_BYTES))
        codec = self._codecs.get(column)
        try:
            with self._files.open(path) as descriptor:
                if not self._indexed[column][shard]:
                    self._load_index(descriptor, path, column, shard, row)
                offsets = self._offsets[column][rows, views].tolist()
                sizes = self._sizes[column][rows, views].tolist() if codec else ()
                for at, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
                    out = memory[place * row_bytes : (place + 1) * row_bytes]
                    chunk = memoryview(bytearray(sizes[at] - CHECKSUM_BYTES)) if codec else out
                    reason = _REASONS.get(offsets[at])
                    if reason is None and not _read_chunk(descriptor, chunk, scratch, offsets[at]):
                        reason = "the file was cut off"
                    if (
                        reason is None
                        and self.check_crc
                        and crc32c(chunk) != int.from_bytes(scratch, "little")
                    ):
                        reason = "wrong checksum"
                    if reason is None and codec is not None:
                        reason = codec.decode(chunk, out)
                    if reason is not None:
                        raise CorruptRowError(row=row, column=column, path=path, reason=reason)
        except OSError as error:
            raise CacheError(
                f"row {row} of {column} cannot be read from {path}: {error.strerror}; run `repa cache verify "
                f"{self.path}` to see what else is wrong"
            ) from error

    def _path(self, column: str, shard: int) -> str:
        # building a path takes as long as reading 50 kB; a batch may touch a shard per row
        path = self._paths.get((column, shard))
        if path is None:
            path = str(shard_file(self.path, column, self.manifest.columns[column], shard))
            self._paths[column, shard] = path
        return path

    def _load_index(self, descriptor: int, path: str, column: str, shard: int, row: int) -> None:
        """Put the index of a shard into the column's table of offsets; two threads may do it at once."""
        shard_rows, views = self.manifest.shard_rows, len(self.manifest.views)
        here = slice(shard * shard_rows, (shard + 1) * shard_rows)
        try:
            index = read_index(descriptor, path, shard_rows, views)
        except CacheError as error:
            raise CorruptRowError(row=row, column=column, path=path, reason=str(error)) from error
        starts, sizes = index[..., 0], index[..., 1]
        # a place past 2⁶³ is past the end of any file; it must not turn negative
        offsets = np.minimum(starts, np.uint64(2**63 - 1 - 2**32)).astype(np.int64)
        if column in self._codecs:
            # what is no size of a chunk must not be asked for as memory either
            wrong = (sizes <= CHECKSUM_BYTES) | (sizes > os.fstat(descriptor).st_size)
            self._sizes[column][here] = np.where(wrong, CHECKSUM_BYTES, sizes).astype(np.int64)
        else:
            wrong = sizes != self.manifest.columns[column].row_bytes + CHECKSUM_BYTES
        offsets[wrong] = _WRONG_SIZE
        offsets[(starts == MISSING) & (sizes == MISSING)] = _NO_CHUNK
        self._offsets[column][here] = offsets
        self._indexed[column][shard] = True

    def _check_rows(self, rows: NDArray[np.int64], views: NDArray[np.int64] | None) -> None:
        outside = rows[(rows < 0) | (rows >= self.manifest.num_rows)]
        if len(outside):
            raise CacheError(
                f"row {outside[0]} is not one of the {self.manifest.num_rows} of cache {self.path}"
            )
        if not self._valid[rows].all():
            row = int(rows[~self._valid[rows]][0])
            raise CacheError(
                f"row {row} of cache {self.path} is invalid, its image could not be decoded; use valid_rows"
            )
        if views is not None:
            count = len(self.manifest.views)
            if views.shape != rows.shape:
                raise ValueError(f"{len(views)} views do not fit {len(rows)} rows")
            if ((views < 0) | (views >= count)).any():
                raise CacheError(f"a view outside the {count} of cache {self.path} was asked for")

    def _target(self, column: str, count: int, out: Mapping[str, NDArray[Any]]) -> _Target:
        if column not in self.columns:
            raise CacheError(
                f"column {column} was not asked for when cache {self.path} was opened "
                f"(opened: {', '.join(self.columns) or 'none'}); add it to the reader's columns"
            )
        spec, array = self.manifest.columns[column], out[column]
        expected = (count, *spec.shape)
        if array.shape != expected or array.dtype != spec.numpy_dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"the array for {column} is {array.dtype} {array.shape}, "
                f"not a C-contiguous {spec.dtype} {expected}"
            )
        return _Target(column, array.reshape(-1).view(np.uint8).data, spec.row_bytes)

    def _require_committed(self) -> None:
        for source in dict.fromkeys(source_of(column) for column in self.columns):
            shards = range(self.manifest.num_shards)
            absent = sorted(set(shards) - set(committed_shards(self.path, self.manifest, source)))
            if absent:
                raise CacheError(
                    f"{len(absent)} of the {len(shards)} shards of {source} in {self.path} are not wholly "
                    f"written, the first is shard {absent[0]}; run the same `repa preprocess` to write them"
                )

    def _after_fork(self) -> None:
        # a lock held by a thread of the parent would never be released here
        self._lock = threading.Lock()
        self._files.after_fork()


def _read_chunk(descriptor: int, chunk: memoryview, scratch: memoryview, offset: int) -> bool:
    """Read a chunk and its checksum; False when the file ends before."""
    total = len(chunk) + CHECKSUM_BYTES
    count = os.preadv(descriptor, [chunk, scratch], offset)
    while count < total:
        # rare: a signal or a network file system cut the read short
        rest = [chunk[count:], scratch] if count < len(chunk) else [scratch[count - len(chunk) :]]
        more = os.preadv(descriptor, rest, offset + count)
        if more == 0:
            return False
        count += more
    return True


_READERS: weakref.WeakSet[CacheReader] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for reader in list(_READERS):
        reader._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
