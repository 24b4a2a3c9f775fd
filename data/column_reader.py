"""The chunks of one column: where each lies in its shard file, and its bytes into the caller's memory.

A row and view is one chunk: its raw bytes and their crc32c, which go straight to their places. The chunks of
a compressed column take the slow path: read into memory of their own, checked, decoded, copied.
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
        spec: the column's.

    Raises:
        RepaError: the column's compressor needs a package that is not installed.
    """

    def __init__(self, path: CachePath, manifest: Manifest, column: str, *, check_crc: bool) -> None:
        self.spec = manifest.columns[column]
        self._path = path
        self._manifest = manifest
        self._column = column
        self._check_crc = check_crc
        self._codec = chunk_codec(self.spec)
        self._chunk_bytes = self.spec.row_bytes + CHECKSUM_BYTES
        self._paths: dict[int, str] = {}
        self._chunks: dict[int, _Chunks] = {}

    def read(
        self,
        files: ShardFiles,
        shard: int,
        rows: NDArray[np.int64],
        views: NDArray[np.int64],
        memory: memoryview,
        places: NDArray[np.intp],
    ) -> None:
        """Read rows of one shard.

        Args:
            files: where its bytes come from.
            shard: index of the shard.
            rows: rows of the cache, of this shard, ``int64 [n]``.
            views: view of each.
            memory: bytes of the caller's array.
            places: which row of that array each goes to.

        Raises:
            CorruptRowError: stored bytes are missing, cut off or do not match their checksum.
            CacheError: the file cannot be read.
        """
        path, row = self.shard_path(shard), int(rows[0])
        checksum = memoryview(bytearray(CHECKSUM_BYTES))
        row_bytes, codec = self.spec.row_bytes, self._codec
        try:
            with files.open(path) as handle:
                offsets, sizes = self._places(files, handle, shard, rows, views)
                for at, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
                    out = memory[place * row_bytes : (place + 1) * row_bytes]
                    chunk = memoryview(bytearray(sizes[at] - CHECKSUM_BYTES)) if codec else out
                    reason = _REASONS.get(offsets[at])
                    if reason is None and not files.read(handle, offsets[at], chunk, checksum):
                        reason = "the file was cut off"
                    if (
                        reason is None
                        and self._check_crc
                        and crc32c(chunk) != int.from_bytes(checksum, "little")
                    ):
                        reason = "wrong checksum"
                    if reason is None and codec is not None:
                        reason = codec.decode(chunk, out)
                    if reason is not None:
                        raise CorruptRowError(row=row, column=self._column, path=path, reason=reason)
        except OSError as error:
            remedy = (
                "look at the connection and the credentials"
                if isinstance(self._path, RemotePath)
                else f"run `repa cache verify {self._path}` to see what else is wrong"
            )
            raise CacheError(
                f"row {row} of {self._column} cannot be read from {path}: {error.strerror}; {remedy}"
            ) from error

    def load_index(self, files: ShardFiles, row: int) -> None:
        """Read the index of a row's shard, as the first read of the shard does.

        Raises:
            CacheError: as `read`.
        """
        shard = row // self._manifest.shard_rows
        with files.open(self.shard_path(shard)) as handle:
            if shard not in self._chunks:
                self._chunks[shard] = self._load(files, handle, shard, row)

    def probe(self, files: ShardFiles, row: int) -> None:
        """Read a row of the first view to nowhere.

        Raises:
            CacheError: as `read`.
        """
        out = memoryview(bytearray(self.spec.row_bytes))
        rows, first = np.array([row], dtype=np.int64), np.zeros(1, dtype=np.int64)
        self.read(files, row // self._manifest.shard_rows, rows, first, out, first)

    def shard_path(self, shard: int) -> str:
        """The file of a shard."""
        # building a path takes as long as reading 50 kB; a batch may touch a shard per row
        path = self._paths.get(shard)
        if path is None:
            path = self._paths[shard] = str(shard_file(self._path, self._column, self.spec, shard))
        return path

    def _places(
        self, files: ShardFiles, handle: Any, shard: int, rows: NDArray[np.int64], views: NDArray[np.int64]
    ) -> tuple[list[int], list[int]]:
        """Offset of every row, or why it has none; sizes if the column is compressed."""
        chunks = self._chunks.get(shard)
        if chunks is None:
            # two threads may do it at once
            chunks = self._chunks[shard] = self._load(files, handle, shard, int(rows[0]))
        within = rows - shard * self._manifest.shard_rows
        if chunks.offsets is None:
            return ((within * len(self._manifest.views) + views) * self._chunk_bytes).tolist(), []
        sizes = [] if chunks.sizes is None else chunks.sizes[within, views].tolist()
        return chunks.offsets[within, views].tolist(), sizes

    def _load(self, files: ShardFiles, handle: Any, shard: int, row: int) -> _Chunks:
        """The index of a shard, as far as it must be kept."""
        path = self.shard_path(shard)
        shard_rows, views = self._manifest.shard_rows, len(self._manifest.views)
        tail, file_bytes = files.tail(handle, index_bytes(shard_rows, views))
        try:
            index = decode_index(tail, file_bytes, path, shard_rows, views)
        except CacheError as error:
            raise CorruptRowError(row=row, column=self._column, path=path, reason=str(error)) from error
        starts, sizes = index[..., 0], index[..., 1]
        # a place past 2⁶³ is past the end of any file; it must not turn negative
        offsets = np.minimum(starts, np.uint64(2**63 - 1 - 2**32)).astype(np.int64)
        # what is no size of a chunk must not be asked for as memory either
        wrong = (
            sizes != self._chunk_bytes
            if self._codec is None
            else (sizes <= CHECKSUM_BYTES) | (sizes > file_bytes)
        )
        offsets[wrong] = _WRONG_SIZE
        offsets[(starts == MISSING) & (sizes == MISSING)] = _NO_CHUNK
        if self._codec is not None:
            return _Chunks(offsets, np.where(wrong, CHECKSUM_BYTES, sizes).astype(np.int64))
        used = len(self._manifest.shard_range(shard))
        regular = np.arange(used * views).reshape(used, views) * self._chunk_bytes
        return _Chunks(None if np.array_equal(offsets[:used], regular) else offsets, None)
