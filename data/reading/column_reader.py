"""The reader of one column's chunks, from their offsets in shard files to the caller's memory.

A row and view is one chunk: its raw bytes and their crc32c, which go straight to where they are wanted.
Those of a compressed column take the slow path: read into memory of their own, checked, decoded, copied.

Rows are read in two passes: what is in the page cache is taken at once and the rest is asked for; then the
rest is waited for. So a disk has many requests to work on however few the threads, and what is in memory
costs no extra call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from crc32c import crc32c

from ..errors import CacheError, CorruptRowError
from ..format.compression import chunk_codec
from ..format.layout import shard_file
from ..format.shard_index import MISSING, decode_index, index_bytes
from ..storage.bucket import RemotePath
from ..storage.local import CHECKSUM_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath
    from ..storage.local import ShardFiles

# in a table of offsets: the index has no entry for the chunk, or one of the wrong size
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


class Places(NamedTuple):
    """Which rows are read and where they go, as all columns need it. `places_of` makes it.

    Attributes:
        rows: rows of the cache.
        shards: shard of each.
        distinct: the shards.
        within: row of each within its shard, int64 ``[n]``.
        views: view of each, int64 ``[n]``.
        targets: row of the caller's array each goes to, ``[n]``.
    """

    rows: list[int]
    shards: list[int]
    distinct: frozenset[int]
    within: NDArray[np.int64]
    views: NDArray[np.int64]
    targets: NDArray[np.intp]


def places_of(
    manifest: Manifest, rows: NDArray[np.int64], views: NDArray[np.int64], targets: NDArray[np.intp]
) -> Places:
    """Find where rows lie in the shards of a cache, whatever the column.

    Args:
        manifest: the cache's.
        rows: rows of the cache, ``int64 [n]``; fastest if they ascend.
        views: view of each.
        targets: which row of the caller's array each goes to.
    """
    shards, within = np.divmod(rows, manifest.shard_rows)
    owners = shards.tolist()
    return Places(rows.tolist(), owners, frozenset(owners), within, views, targets)


class ColumnReader:
    """Reads rows of one column. Threads may share it.

    Args:
        path: folder of the cache.
        manifest: its manifest, which declares the column.
        column: name of the column.
        check_crc: compare every row with its checksum.
        checksums: those recorded when the rows were committed, ``uint32 [≥ N, V]``, so that an intact row of
            another shard or column is not taken for this one. None compares with those stored behind the
            rows.

    Attributes:
        manifest: as given.
        column: its name.
        spec: the column's.
        row_bytes: of a row and view, as the caller gets it.
        codec: of a compressed column.
        check_crc: as given.

    Raises:
        RepaError: the column's compressor needs a package that is not installed.
    """

    def __init__(
        self,
        path: CachePath,
        manifest: Manifest,
        column: str,
        *,
        check_crc: bool,
        checksums: NDArray[np.uint32] | None = None,
    ) -> None:
        self.column = column
        self.spec = manifest.columns[column]
        self.row_bytes = self.spec.row_bytes
        self.codec = chunk_codec(self.spec)
        self.check_crc = check_crc
        self._checksums = checksums
        self._path = path
        self.manifest = manifest
        self._chunk_bytes = self.row_bytes + CHECKSUM_BYTES
        self._paths: dict[int, str] = {}
        self._chunks: dict[int, _Chunks] = {}
        # whether there is a shard of which more must be known than that its chunks are in order
        self._irregular = False

    def start(self, files: ShardFiles, places: Places, memory: memoryview) -> RowReads:
        """Prepare the reads of some rows and open their files.

        Nothing is read yet but indexes that are not known.

        Args:
            files: where the bytes come from.
            places: the rows.
            memory: bytes of the caller's array.

        Raises:
            CorruptRowError: the index of a shard is cut off or wrong.
            CacheError: a file cannot be opened or read.
        """
        handles = self._open(files, places)
        if not self._chunks.keys() >= places.distinct:
            for shard, handle, row in zip(places.shards, handles, places.rows, strict=True):
                if shard not in self._chunks:
                    # two threads may do it at once, with the same result
                    self._add(shard, self._load(files, handle, row))
        # where chunks follow one another the offsets of all rows are computed together; the rows of other
        # shards are looked up one by one
        chunks = places.within * len(self.manifest.views) + places.views
        offsets = (chunks * self._chunk_bytes).tolist()
        sizes: list[int] = []
        if self._irregular:
            for at, shard in enumerate(places.shards):
                known, where = self._chunks[shard], (places.within[at], places.views[at])
                if known.offsets is not None:
                    offsets[at] = int(known.offsets[where])
                if known.sizes is not None:
                    sizes.append(int(known.sizes[where]))
        row_bytes = self.row_bytes
        outs = [memory[start : start + row_bytes] for start in (places.targets * row_bytes).tolist()]
        recorded = None
        if self._checksums is not None and self.check_crc:
            recorded = self._checksums[places.rows, places.views].tolist()
        return RowReads(self, files, handles, places.rows, offsets, sizes, outs, recorded)

    def load_index(self, files: ShardFiles, row: int) -> None:
        """Read the index of a row's shard, as the first read of the shard does.

        Raises:
            CacheError: as `start`.
        """
        rows, first = np.array([row], dtype=np.int64), np.zeros(1, dtype=np.int64)
        self.start(files, places_of(self.manifest, rows, first, first), memoryview(b""))

    def shard_path(self, shard: int) -> str:
        """Return the path of a shard's file."""
        # building a path takes as long as reading 50 kB; a batch may touch a shard per row
        path = self._paths.get(shard)
        if path is None:
            path = self._paths[shard] = str(shard_file(self._path, self.column, self.spec, shard))
        return path

    def corrupt(self, row: int, reason: str) -> CorruptRowError:
        """Make the error of a row whose stored bytes are not what was written."""
        path = self.shard_path(row // self.manifest.shard_rows)
        return CorruptRowError(row=row, column=self.column, path=path, reason=reason)

    def unreadable(self, row: int, error: OSError) -> CacheError:
        """Make the error of a row whose file the operating system does not read."""
        path = self.shard_path(row // self.manifest.shard_rows)
        remedy = (
            "look at the connection and the credentials"
            if isinstance(self._path, RemotePath)
            else f"run `repa cache verify {self._path}` to see what else is wrong"
        )
        return CacheError(
            f"row {row} of {self.column} cannot be read from {path}: {error.strerror}", f"{remedy}"
        )

    def _open(self, files: ShardFiles, places: Places) -> Sequence[Any]:
        """Open the file of every row."""
        # per row this is a look into a dictionary, and hardly more may be: it holds up the other threads
        try:
            paths = list(map(self._paths.__getitem__, places.shards))
        except KeyError:
            paths = [self.shard_path(shard) for shard in places.shards]
        try:
            return files.open(paths)
        except OSError as error:
            first = paths.index(error.filename) if error.filename in paths else 0
            raise self.unreadable(places.rows[first], error) from error

    def _add(self, shard: int, chunks: _Chunks) -> None:
        self._chunks[shard] = chunks
        if chunks.offsets is not None:
            self._irregular = True

    def _load(self, files: ShardFiles, handle: Any, row: int) -> _Chunks:
        """Load the index of a row's shard, as far as it must be kept."""
        shard_rows, views = self.manifest.shard_rows, len(self.manifest.views)
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
        # an offset past 2⁶³ is past the end of any file; it must not turn negative
        offsets = np.minimum(starts, np.uint64(2**63 - 1 - 2**32)).astype(np.int64)
        # a size that no chunk can have is not believed: memory of that size would be asked for
        wrong = (
            sizes != self._chunk_bytes
            if self.codec is None
            else (sizes <= CHECKSUM_BYTES) | (sizes > file_bytes)
        )
        offsets[wrong] = _WRONG_SIZE
        offsets[(starts == MISSING) & (sizes == MISSING)] = _NO_CHUNK
        if self.codec is not None:
            return _Chunks(offsets, np.where(wrong, CHECKSUM_BYTES, sizes).astype(np.int64))
        # the last shard of a cache may be part empty: its index is as long as the others'
        used = len(self.manifest.shard_range(shard))
        regular = np.arange(used * views).reshape(used, views) * self._chunk_bytes
        return _Chunks(None if np.array_equal(offsets[:used], regular) else offsets, None)


class RowReads:
    """Rows of one column on their way into the caller's memory. Call `take_ready` first, then `wait`.

    Args:
        column: the column's.
        files: where the bytes come from.
        handles: of `files`, one a row.
        rows: rows of the cache.
        offsets: of their chunks, or why there is none.
        sizes: of their chunks, checksums included; only of a compressed column.
        outs: where each row goes.
        recorded: checksum of each, as committed.
    """

    def __init__(
        self,
        column: ColumnReader,
        files: ShardFiles,
        handles: Sequence[Any],
        rows: Sequence[int],
        offsets: Sequence[int],
        sizes: Sequence[int],
        outs: Sequence[memoryview],
        recorded: Sequence[int] | None,
    ) -> None:
        self._column = column
        self._files = files
        self._handles = handles
        self._rows = rows
        self._offsets = offsets
        self._outs = outs
        self._recorded = recorded
        self._chunks = (
            outs if column.codec is None else [memoryview(bytearray(size - CHECKSUM_BYTES)) for size in sizes]
        )
        # one for all rows: each is compared before the next is read
        self._checksum = bytearray(CHECKSUM_BYTES)
        self._waiting: Sequence[int] = ()

    def take_ready(self) -> None:
        """Read the rows that are in memory and ask for the bytes of the others.

        Raises:
            CorruptRowError: stored bytes are missing or do not match their checksum.
        """
        # a single look in the usual case, where no chunk is missing
        if min(self._offsets, default=0) < 0:
            at, reason = next((at, _REASONS[offset]) for at, offset in enumerate(self._offsets) if offset < 0)
            raise self._column.corrupt(self._rows[at], reason)
        done = set()
        for at in self._files.read_ready(self._handles, self._offsets, self._chunks, self._checksum):
            self._finish(at)
            done.add(at)
        self._waiting = [at for at in range(len(self._rows)) if at not in done]

    def wait(self) -> None:
        """Read the rows that are left.

        Raises:
            CorruptRowError: stored bytes are cut off or do not match their checksum.
            CacheError: a file cannot be read.
        """
        for at in self._waiting:
            handle, offset, chunk = self._handles[at], self._offsets[at], self._chunks[at]
            try:
                whole = self._files.read(handle, offset, chunk, self._checksum)
            except OSError as error:
                raise self._column.unreadable(self._rows[at], error) from error
            if not whole:
                raise self._column.corrupt(self._rows[at], "the file was cut off")
            self._finish(at)

    def _finish(self, at: int) -> None:
        """Compare a row that was read with its checksum, and decode it if the column is compressed."""
        column, chunk = self._column, self._chunks[at]
        reason = None
        if column.check_crc:
            # two different faults: damaged bytes, and sound bytes of something else
            found = crc32c(chunk)
            if found != int.from_bytes(self._checksum, "little"):
                reason = "wrong checksum"
            elif self._recorded is not None and found != self._recorded[at]:
                reason = "intact, but not what was committed there"
        if reason is None and column.codec is not None:
            reason = column.codec.decode(chunk, self._outs[at])
        if reason is not None:
            raise column.corrupt(self._rows[at], reason)
