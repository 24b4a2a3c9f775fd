"""The chunks of one column: where each lies in its shard file, and its bytes into the caller's memory.

A row and view is one chunk: its raw bytes and their crc32c, which go straight to their places. The chunks of
a compressed column take the slow path: read into memory of their own, checked, decoded, copied.

Rows are read in two passes: what is in the page cache is taken at once and the rest is asked for; then the
rest is waited for. So a disk has many requests to work on however few the threads, and what is in memory
costs no extra call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from crc32c import crc32c

from .compression import chunk_codec
from .errors import CacheError, CorruptRowError
from .layout import shard_file
from .remote import RemotePath
from .shard_index import CHECKSUM_BYTES, MISSING, decode_index, index_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from .remote import CachePath
    from .schema import Manifest
    from .shard_files import ShardFiles

# in a table of offsets: the index gives the chunk no place, or one of the wrong size
_NO_CHUNK = -1
_WRONG_SIZE = -2
_REASONS = {_NO_CHUNK: "its chunk is missing", _WRONG_SIZE: "its chunk has another size"}


class _Chunks(NamedTuple):
    """Where the chunks of a shard are, ``int64 [rows, V]`` each.

    Attributes:
        offsets: of each chunk, or why it has none; None when one follows the other from the file's beginning,
            as in every shard without invalid rows: then nothing need be kept.
        sizes: bytes of each chunk of a compressed column.
    """

    offsets: NDArray[np.int64] | None
    sizes: NDArray[np.int64] | None


class ColumnReader:
    """Reads rows of one column; threads may share it.

    Args:
        path: folder of the cache.
        manifest: its manifest, which declares the column.
        column: name of the column.
        check_crc: compare every row with its checksum.

    Attributes:
        column: its name.
        spec: the column's.
        row_bytes: of a row and view, as the caller gets it.
        codec: of a compressed column.
        check_crc: as given.

    Raises:
        RepaError: the column's compressor needs a package that is not installed.
    """

    def __init__(self, path: CachePath, manifest: Manifest, column: str, *, check_crc: bool) -> None:
        self.column = column
        self.spec = manifest.columns[column]
        self.row_bytes = self.spec.row_bytes
        self.codec = chunk_codec(self.spec)
        self.check_crc = check_crc
        self._path = path
        self._manifest = manifest
        self._chunk_bytes = self.row_bytes + CHECKSUM_BYTES
        self._paths: dict[int, str] = {}
        self._chunks: dict[int, _Chunks] = {}
        # whether there is a shard of which more must be known than that its chunks are in order
        self._irregular = False

    def start(
        self,
        files: ShardFiles,
        rows: NDArray[np.int64],
        views: NDArray[np.int64],
        memory: memoryview,
        places: NDArray[np.intp],
    ) -> RowReads:
        """The reads of some rows, their files open; nothing is read yet but indexes that are not known.

        Args:
            files: where the bytes come from.
            rows: rows of the cache, ``int64 [n]``; fastest if they ascend.
            views: view of each.
            memory: bytes of the caller's array.
            places: which row of that array each goes to.

        Raises:
            CorruptRowError: the index of a shard is cut off or wrong.
            CacheError: a file cannot be opened or read.
        """
        shards, within = np.divmod(rows, self._manifest.shard_rows)
        numbers, owners = rows.tolist(), shards.tolist()
        paths = [self._paths.get(shard) or self.shard_path(shard) for shard in owners]
        try:
            handles = files.open(paths)
        except OSError as error:
            first = paths.index(error.filename) if error.filename in paths else 0
            raise self.unreadable(numbers[first], error) from error
        if not self._chunks.keys() >= set(owners):
            for shard, handle, row in zip(owners, handles, numbers, strict=True):
                if shard not in self._chunks:
                    # two threads may do it at once
                    self._add(shard, self._load(files, handle, row))
        offsets = ((within * len(self._manifest.views) + views) * self._chunk_bytes).tolist()
        sizes: list[int] = []
        if self._irregular:
            for at, shard in enumerate(owners):
                chunks = self._chunks[shard]
                if chunks.offsets is not None:
                    offsets[at] = int(chunks.offsets[within[at], views[at]])
                if chunks.sizes is not None:
                    sizes.append(int(chunks.sizes[within[at], views[at]]))
        starts = (places * self.row_bytes).tolist()
        return RowReads(self, files, handles, numbers, offsets, sizes, memory, starts)

    def load_index(self, files: ShardFiles, row: int) -> None:
        """Read the index of a row's shard, as the first read of the shard does.

        Raises:
            CacheError: as `start`.
        """
        rows, first = np.array([row], dtype=np.int64), np.zeros(1, dtype=np.int64)
        self.start(files, rows, first, memoryview(b""), first)

    def shard_path(self, shard: int) -> str:
        """The file of a shard."""
        # building a path takes as long as reading 50 kB; a batch may touch a shard per row
        path = self._paths.get(shard)
        if path is None:
            path = self._paths[shard] = str(shard_file(self._path, self.column, self.spec, shard))
        return path

    def corrupt(self, row: int, reason: str) -> CorruptRowError:
        """The error of a row whose stored bytes are not what was written."""
        path = self.shard_path(row // self._manifest.shard_rows)
        return CorruptRowError(row=row, column=self.column, path=path, reason=reason)

    def unreadable(self, row: int, error: OSError) -> CacheError:
        """The error of a row whose file the operating system does not read."""
        path = self.shard_path(row // self._manifest.shard_rows)
        remedy = (
            "look at the connection and the credentials"
            if isinstance(self._path, RemotePath)
            else f"run `repa cache verify {self._path}` to see what else is wrong"
        )
        return CacheError(
            f"row {row} of {self.column} cannot be read from {path}: {error.strerror}; {remedy}"
        )

    def _add(self, shard: int, chunks: _Chunks) -> None:
        self._chunks[shard] = chunks
        if chunks.offsets is not None:
            self._irregular = True

    def _load(self, files: ShardFiles, handle: Any, row: int) -> _Chunks:
        """The index of a row's shard, as far as it must be kept."""
        shard_rows, views = self._manifest.shard_rows, len(self._manifest.views)
        shard = row // shard_rows
        path = self.shard_path(shard)
        try:
            tail, file_bytes = files.tail(handle, index_bytes(shard_rows, views))
            index = decode_index(tail, file_bytes, path, shard_rows, views)
        except OSError as error:
            raise self.unreadable(row, error) from error
        except CacheError as error:
            raise self.corrupt(row, str(error)) from error
        starts, sizes = index[..., 0], index[..., 1]
        # a place past 2⁶³ is past the end of any file; it must not turn negative
        offsets = np.minimum(starts, np.uint64(2**63 - 1 - 2**32)).astype(np.int64)
        # what is no size of a chunk must not be asked for as memory either
        wrong = (
            sizes != self._chunk_bytes
            if self.codec is None
            else (sizes <= CHECKSUM_BYTES) | (sizes > file_bytes)
        )
        offsets[wrong] = _WRONG_SIZE
        offsets[(starts == MISSING) & (sizes == MISSING)] = _NO_CHUNK
        if self.codec is not None:
            return _Chunks(offsets, np.where(wrong, CHECKSUM_BYTES, sizes).astype(np.int64))
        used = len(self._manifest.shard_range(shard))
        regular = np.arange(used * views).reshape(used, views) * self._chunk_bytes
        return _Chunks(None if np.array_equal(offsets[:used], regular) else offsets, None)


class RowReads:
    """Rows of one column on their way into the caller's memory: first `take_ready`, then `wait`.

    Args:
        column: the column's.
        files: where the bytes come from.
        handles: of `files`, one a row.
        rows: rows of the cache.
        offsets: of their chunks, or why there is none.
        sizes: of their chunks, checksums included.
        memory: bytes of the caller's array.
        starts: where each row begins in it.
    """

    def __init__(
        self,
        column: ColumnReader,
        files: ShardFiles,
        handles: Sequence[Any],
        rows: Sequence[int],
        offsets: Sequence[int],
        sizes: Sequence[int],
        memory: memoryview,
        starts: Sequence[int],
    ) -> None:
        self._column = column
        self._files = files
        self._handles = handles
        self._rows = rows
        self._offsets = offsets
        self._sizes = sizes
        self._memory = memory
        self._starts = starts
        self._checksum = memoryview(bytearray(CHECKSUM_BYTES))
        self._waiting: Sequence[int] = range(len(rows))

    def take_ready(self) -> None:
        """Read the rows that are in memory; of the others, ask for the bytes.

        Raises:
            CorruptRowError: stored bytes are missing or do not match their checksum.
            CacheError: a file cannot be read.
        """
        column, memory, checksum = self._column, self._memory, self._checksum
        if column.codec is not None:
            self._waiting = [at for at in self._waiting if not self._read(at, self._files.try_read)]
            return
        # `_read` written out: what Python does between two reads holds up the other threads
        try_read, row_bytes, check_crc = self._files.try_read, column.row_bytes, column.check_crc
        places = zip(self._handles, self._offsets, self._starts, strict=True)
        waiting = []
        try:
            for at, (handle, offset, start) in enumerate(places):
                chunk = memory[start : start + row_bytes]
                if offset < 0 or not try_read(handle, offset, chunk, checksum):
                    waiting.append(at)
                elif check_crc and crc32c(chunk) != int.from_bytes(checksum, "little"):
                    raise column.corrupt(self._rows[at], "wrong checksum")
        except OSError as error:
            raise column.unreadable(self._rows[at], error) from error
        self._waiting = waiting

    def wait(self) -> None:
        """Read the rows that are left.

        Raises:
            CorruptRowError: stored bytes are missing, cut off or do not match their checksum.
            CacheError: a file cannot be read.
        """
        for at in self._waiting:
            if not self._read(at, self._files.read):
                raise self._column.corrupt(self._rows[at], "the file was cut off")

    def _read(self, at: int, read: Callable[[Any, int, memoryview, memoryview], bool]) -> bool:
        """Read a row by a method of the files, check it, put it in its place; False if the method did not."""
        column, offset, start = self._column, self._offsets[at], self._starts[at]
        if offset < 0:
            raise column.corrupt(self._rows[at], _REASONS[offset])
        out = self._memory[start : start + column.row_bytes]
        codec, checksum = column.codec, self._checksum
        chunk = out if codec is None else memoryview(bytearray(self._sizes[at] - CHECKSUM_BYTES))
        try:
            if not read(self._handles[at], offset, chunk, checksum):
                return False
        except OSError as error:
            raise column.unreadable(self._rows[at], error) from error
        reason = None
        if column.check_crc and crc32c(chunk) != int.from_bytes(checksum, "little"):
            reason = "wrong checksum"
        elif codec is not None:
            reason = codec.decode(chunk, out)
        if reason is not None:
            raise column.corrupt(self._rows[at], reason)
        return True
