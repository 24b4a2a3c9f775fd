"""Rows of a cache straight into the caller's buffers, by threads and ``preadv`` through the shard indexes.

A row and view is one inner chunk of a shard file: its raw bytes and their crc32c. One ``preadv`` puts the
bytes into the caller's array and the checksum beside it; nothing is copied in between. ``preadv`` and the
checksum run without the interpreter's lock, so threads add up.

The chunks of a compressed column take the slow path: read into memory of their own, checked, decoded, copied.
It is the same threads that do it, the codecs run without the lock too, and one batch may mix both. So they do
for reads past the page cache (`direct`) and for rows of a bucket (`bucket`).
"""

from __future__ import annotations

import os
import threading
import weakref
from concurrent.futures import wait
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import CacheError, RepaError
from ..format.captions import SOURCE_KIND, captions_path, of_captions, with_captions
from ..format.columns import LABEL, source_of
from ..format.opening import open_manifest, read_labels
from ..format.survey import row_checksums, survey
from ..storage.bucket import REQUESTS, CachePath, RemotePath, cache_path
from ..storage.direct import (
    DIRECT_CHOICES,
)
from ..storage.local import open_files_limit
from .captioned import CaptionTable
from .chosen_files import chosen_files
from .column_reader import ColumnReader, places_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from concurrent.futures import Executor, Future

    from numpy.typing import NDArray

    from ..format.survey import Survey
    from ..storage.local import ShardFiles


# rows of a thread whose bytes are asked for before the first is waited for
_AT_ONCE = 32


class _Target(NamedTuple):
    """Where a column's rows go, the bytes of ``out[column]`` row after row.

    The array itself is kept too: it may be what tells its owner that the memory is in use, and NumPy's views
    of it would not.
    """

    column: str
    array: NDArray[Any]
    memory: memoryview
    reader: ColumnReader


class CacheReader:
    """Reads rows of the columns of one cache.

    It is safe to share between threads, to fork with and to pickle.

    Starts no threads and opens no shard before the first row is read.

    Args:
        path: folder of the cache, or its address in a bucket, ``s3://bucket/path``.
        columns: the columns that may be read, without ``label``.
        check_crc: compare every row with its checksum.
        max_open_files: shard files held open, by default half of what the process may open, at most 8,192;
            while rows are read there may be half as many more, or one a thread and column.
        direct: ``on`` reads past the page cache (O_DIRECT), ``off`` through it; ``auto`` decides when the
            first rows are asked for: past it if the columns are larger than half of the free memory, and a
            few rows read either way come faster so. Without effect in a bucket.

    Attributes:
        manifest: the cache's manifest; if columns of captions are read, with the captions' columns.
        captions: which captions each image has; None unless columns of captions are read.
        texts: reads these columns by row of the captions; None unless they are read.
        labels: class of every row, ``int32 [N]``.
        invalid_rows: rows whose image could not be decoded, ascending.
        valid_rows: all others, ascending.

    Raises:
        CacheError: there is no cache, or a column is missing or not completely written; names what is missing
            and the command that adds it.
        RepaError: a column's compressor or the bucket needs a package that is not installed.
    """

    def __init__(
        self,
        path: CachePath | str,
        columns: Sequence[str],
        *,
        check_crc: bool = True,
        max_open_files: int | None = None,
        direct: str = "auto",
    ) -> None:
        if direct not in DIRECT_CHOICES:
            raise RepaError(f"direct={direct} is not valid: expected one of {', '.join(DIRECT_CHOICES)}")
        self.path = cache_path(path)
        self.columns = tuple(dict.fromkeys(column for column in columns if column != LABEL))
        self.check_crc = check_crc
        self.max_open_files = open_files_limit() if max_open_files is None else max_open_files
        self.direct = direct
        images = open_manifest(self.path)
        in_captions = images.source_kind != SOURCE_KIND and any(map(of_captions, self.columns))
        self.manifest = with_captions(self.path, images) if in_captions else images
        self.manifest.require(self.columns, where=str(self.path))
        own = tuple(column for column in self.columns if not (in_captions and of_captions(column)))
        # a shard that is missing is told now, not hours into a training run
        found = survey(self.path, images)
        for source in dict.fromkeys(source_of(column) for column in own):
            self._require_committed(source, found)
        self.texts: CacheReader | None = None
        self.captions: CaptionTable | None = None
        if in_captions:
            self.texts = CacheReader(
                captions_path(self.path),
                [column for column in self.columns if column not in own],
                check_crc=check_crc,
                max_open_files=max_open_files,
                direct=direct,
            )
            self.captions = CaptionTable(self.path, images, self.texts.manifest)
        self.labels = read_labels(self.path, images)
        self.invalid_rows = found.invalid_rows()
        self._valid = np.ones(self.manifest.num_rows, dtype=bool)
        self._valid[self.invalid_rows] = False
        self.valid_rows: NDArray[np.int64] = np.flatnonzero(self._valid).astype(np.int64, copy=False)
        self._column_bytes = {column: found.file_bytes[column] for column in own}
        self._readers = {
            column: ColumnReader(
                self.path,
                images,
                column,
                check_crc=check_crc,
                checksums=row_checksums(images, column, found.records[source_of(column)]),
            )
            for column in own
        }
        # whether they are read directly is measured when the first rows are asked for: opening stays quick
        self._files: ShardFiles | None = None
        self._bytes_read = dict.fromkeys(own, 0)
        self._lock = threading.Lock()
        _READERS.add(self)

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # a spawned process opens the cache anew; descriptors and locks do not travel
        options = partial(
            CacheReader, check_crc=self.check_crc, max_open_files=self.max_open_files, direct=self.direct
        )
        return options, (self.path, self.columns)

    @property
    def is_local(self) -> bool:
        """Whether its shards are files of this machine, or of one that it has mounted."""
        return not isinstance(self.path, RemotePath)

    @property
    def bytes_read(self) -> dict[str, int]:
        """Bytes of rows read so far, without checksums, by column."""
        with self._lock:
            own = dict(self._bytes_read)
        return own if self.texts is None else {**own, **self.texts.bytes_read}

    def close(self) -> None:
        """Close the shard files. Reading afterwards opens them again."""
        if self._files is not None:
            self._files.close()
        if self.texts is not None:
            self.texts.close()

    def threads_for(self, threads: int) -> int:
        """Choose how many threads should read where the user asked for so many.

        There are more where each mostly waits.
        """
        return max(threads, REQUESTS) if isinstance(self.path, RemotePath) else threads

    def read_rows(
        self,
        rows: NDArray[np.int64],
        columns: Sequence[str],
        out: Mapping[str, NDArray[Any]],
        *,
        views: NDArray[np.int64] | None = None,
        captions: NDArray[np.int64] | None = None,
        pool: Executor | None = None,
        parts: int = 1,
    ) -> None:
        """Read rows into the caller's arrays, in the order asked for.

        Args:
            rows: rows of the cache, ``int64 [B]``.
            columns: columns to read, of those the reader was opened with.
            out: column → C-contiguous array ``[B, *shape]`` of the stored dtype.
            views: view of each row, ``int64 [B]``, the same for all columns; the first view by default.
            captions: which caption of each row, from 0, ``int64 [B]``, for columns of captions; the first by
                default.
            pool: runs the parts; the calling thread does without it.
            parts: consecutive parts that the batch is cut into when there is a pool.

        Raises:
            CorruptRowError: stored bytes are missing, cut off or do not match their checksum.
            CacheError: a row is invalid or not of the cache, or a file cannot be read.
            RepaError: ``direct`` is on, and the file system has no direct reads.
            ValueError: an array of ``out`` does not fit.
        """
        if pool is None:
            for task in self._tasks(rows, columns, out, views, captions, 1):
                task()
            return
        futures = self.start_rows(rows, columns, out, views=views, captions=captions, pool=pool, parts=parts)
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
        captions: NDArray[np.int64] | None = None,
        pool: Executor,
        parts: int = 1,
    ) -> list[Future[None]]:
        """Begin what `read_rows` does and return at once. ``out`` is filled when every future is done.

        Errors of the arguments are raised here, those of the files by the futures.
        """
        return [pool.submit(task) for task in self._tasks(rows, columns, out, views, captions, parts)]

    def _tasks(
        self,
        rows: NDArray[np.int64],
        columns: Sequence[str],
        out: Mapping[str, NDArray[Any]],
        views: NDArray[np.int64] | None,
        captions: NDArray[np.int64] | None,
        parts: int,
    ) -> Iterator[partial[None]]:
        """Split a batch into calls, each for consecutive rows of it in the order of the files."""
        self._check_rows(rows, views)
        texts = [] if self.texts is None else [each for each in columns if each in self.texts.columns]
        if self.texts is not None and self.captions is not None and texts:
            of_rows = self.captions.rows_of(rows, captions)
            yield from self.texts._tasks(of_rows, texts, out, None, None, parts)
        targets = [self._target(each, len(rows), out) for each in columns if each not in {LABEL, *texts}]
        if texts and not targets:
            return
        files = self._opened(parts)
        # a file stays open while it is read, even past the limit: what all threads and columns read at once
        # is bounded, so that it adds half of the limit at most, or one file a thread and column
        at_once = max(1, min(_AT_ONCE, self.max_open_files // (2 * parts * max(1, len(targets)))))
        # in the order of the files, so that neighbours share a shard and a disk is read forwards
        order = np.argsort(rows, kind="stable")
        parts = max(1, min(parts, len(rows)))
        for start, stop in pairwise(len(rows) * part // parts for part in range(parts + 1)):
            positions = order[start:stop]
            part_views = np.zeros(len(positions), dtype=np.int64) if views is None else views[positions]
            yield partial(self._read_part, files, rows[positions], part_views, positions, targets, at_once)

    def _read_part(
        self,
        files: ShardFiles,
        rows: NDArray[np.int64],
        views: NDArray[np.int64],
        positions: NDArray[np.intp],
        targets: Sequence[_Target],
        at_once: int,
    ) -> None:
        """Read ascending rows of all columns into the given positions of the targets."""
        for start in range(0, len(rows), at_once):
            piece = slice(start, start + at_once)
            where = places_of(self.manifest, rows[piece], views[piece], positions[piece])
            reads = [target.reader.start(files, where, target.memory) for target in targets]
            # the disk gets the requests of all columns before any of them is waited for
            for read in reads:
                read.take_ready()
            for read in reads:
                read.wait()
        # once a call, not a row: the threads would queue for the lock
        with self._lock:
            for target in targets:
                self._bytes_read[target.column] += target.reader.row_bytes * len(rows)

    def _opened(self, threads: int) -> ShardFiles:
        """Open where the bytes come from. It is chosen the first time, for so many threads."""
        # looked at again under the lock: another thread may have chosen while this one waited for it
        if self._files is None:
            with self._lock:
                if self._files is None:
                    self._files = chosen_files(
                        self.path,
                        self._readers,
                        self._column_bytes,
                        self.valid_rows,
                        direct=self.direct,
                        max_open_files=self.max_open_files,
                        threads=threads,
                    )
        return self._files

    def _check_rows(self, rows: NDArray[np.int64], views: NDArray[np.int64] | None) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= self.manifest.num_rows):
            outside = rows[(rows < 0) | (rows >= self.manifest.num_rows)]
            raise CacheError(
                f"row {outside[0]} is not one of the {self.manifest.num_rows} of cache {self.path}"
            )
        if not self._valid[rows].all():
            row = int(rows[~self._valid[rows]][0])
            raise CacheError(
                f"row {row} of cache {self.path} is invalid, its image could not be decoded", "use valid_rows"
            )
        if views is not None:
            count = len(self.manifest.views)
            if views.shape != rows.shape:
                raise ValueError(f"{len(views)} views do not fit {len(rows)} rows")
            if len(views) and (views.min() < 0 or views.max() >= count):
                raise CacheError(f"a view outside the {count} of cache {self.path} was asked for")

    def _target(self, column: str, count: int, out: Mapping[str, NDArray[Any]]) -> _Target:
        if column not in self.columns:
            raise CacheError(
                f"column {column} was not asked for when cache {self.path} was opened "
                f"(opened: {', '.join(self.columns) or 'none'})",
                "add it to the reader's columns",
            )
        spec, array = self.manifest.columns[column], out[column]
        expected = (count, *spec.shape)
        if array.shape != expected or array.dtype != spec.numpy_dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"the array for {column} is {array.dtype} {array.shape}, "
                f"not a C-contiguous {spec.dtype} {expected}"
            )
        return _Target(column, array, array.reshape(-1).view(np.uint8).data, self._readers[column])

    def _require_committed(self, source: str, found: Survey) -> None:
        for shard, problem in found.foreign[source].items():
            named = problem.column or source
            raise CacheError(
                f"shard {shard} of {named} is not the one that was committed: {problem.what}",
                f"`repa cache verify {self.path}` lists them all, `repa cache repair` encodes them again",
                field=named,
            )
        absent = found.absent[source]
        if absent:
            raise CacheError(
                f"{len(absent)} of the {self.manifest.num_shards} shards of {source} in {self.path} are not "
                f"wholly written, the first is shard {absent[0]}",
                "run the same `repa preprocess` to write them",
            )

    def _after_fork(self) -> None:
        # a lock held by a thread of the parent would never be released here
        self._lock = threading.Lock()
        if self._files is not None:
            self._files.after_fork()


_READERS: weakref.WeakSet[CacheReader] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for reader in list(_READERS):
        reader._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
