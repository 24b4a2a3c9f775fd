"""The check of one column's shard file, which is read from a folder or from a bucket.

A file is read chunk by chunk into one buffer. An object is read in pieces of neighbouring chunks, a few
requests ahead of the checking.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from crc32c import crc32c

from ..errors import CacheError
from ..format.columns import source_of
from ..format.layout import shard_file
from ..format.shard_index import MISSING, decode_index, index_bytes
from ..storage.bucket import RemotePath
from ..storage.files import os_errors, remedy_of
from ..storage.local import CHECKSUM_BYTES
from ..units import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Executor, Future
    from typing import Any

    from numpy.typing import NDArray

    from ..format.commits import CommitRecord
    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath

REDO = "encode it again with `repa cache repair`"

_PIECE = 4 << 20  # bytes of a request
_GAP = 64 << 10  # bytes between two chunks that are rather read than asked around
_AHEAD = 3  # requests of a file on their way


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong in a cache.

    Attributes:
        path: the file.
        what: what is wrong with it, its name included.
        remedy: what to do about it.
        source: the source it belongs to; empty for what belongs to the cache as a whole.
        column: the column; empty for what belongs to all columns.
        shard: the shard, where the file is of one.
        row: the image, where the damage is known to be in its data.
    """

    path: CachePath
    what: str
    remedy: str = ""
    source: str = ""
    column: str = ""
    shard: int | None = None
    row: int | None = None

    def __str__(self) -> str:
        row = "" if self.row is None else f"row {self.row} of {self.column}: "
        return f"{row}{self.what}" + (f"; {self.remedy}" if self.remedy else "")


class _Stored(Protocol):
    """A file that is there."""

    size: int

    def tail(self, size: int) -> bytes:
        """Read the last bytes, at most ``size`` of them."""
        ...

    def chunks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """Read the bytes at each (offset, length), with its number, in any order.

        They are fewer where the file ends.

        They are what they are until the next is asked for.
        """
        ...


class ShardCheck:
    """The check of one column's shard file, for a thread.

    Args:
        path: folder of the cache, or its prefix in a bucket.
        manifest: its manifest.
        column: name of the column.
        record: the shard's, intact.
        requests: the threads that ask a bucket.
    """

    def __init__(
        self, path: CachePath, manifest: Manifest, column: str, record: CommitRecord, requests: Executor
    ) -> None:
        self.bytes = record.columns[column].file_bytes
        self._column = column
        self._record = record
        self._spec = manifest.columns[column]
        self._shape = (manifest.shard_rows, len(manifest.views))
        self._file: CachePath = shard_file(path, column, self._spec, record.shard)
        self._requests = requests

    def __call__(self) -> list[Finding]:
        """Say what is wrong with it, by rows.

        Raises:
            RepaError: the bucket cannot be read.
        """
        try:
            with open_stored(self._file, self._requests) as stored:
                return self._check(stored)
        except FileNotFoundError:
            return [self._finding("is missing")]
        except OSError as error:
            if isinstance(self._file, RemotePath):
                # a connection that fails says nothing of what is there
                with os_errors("read", self._file):
                    raise
            return [self._finding(f"cannot be read: {error.strerror}", remedy=remedy_of(error))]

    def _finding(self, what: str, row: int | None = None, *, remedy: str = REDO) -> Finding:
        return Finding(
            path=self._file,
            what=f"{self._file} {what}",
            remedy=remedy,
            source=source_of(self._column),
            column=self._column,
            shard=self._record.shard,
            row=row,
        )

    def _check(self, stored: _Stored) -> list[Finding]:
        if stored.size != self.bytes:
            return [self._finding(f"has {counted(stored.size, 'byte')} of {self.bytes}")]
        tail = stored.tail(index_bytes(*self._shape))
        try:
            index = decode_index(tail, stored.size, str(self._file), *self._shape)
        except CacheError as error:
            return [self._finding(f"has no sound index ({error})")]
        findings, sound = self._check_index(index)
        checksums = np.zeros(self._shape, dtype="<u4")
        ranges = [(int(index[chunk][0]), int(index[chunk][1])) for chunk in sound]
        for number, data in stored.chunks(ranges):
            row = self._record.rows[0] + sound[number][0]
            if len(data) != ranges[number][1]:
                findings.append(self._finding("ends in the middle of the row", row))
                continue
            checksum = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
            checksums[sound[number]] = checksum
            if crc32c(data[:-CHECKSUM_BYTES]) != checksum:
                findings.append(self._finding("has data that do not match their checksum", row))
        recorded = self._record.columns[self._column].chunks_sha256
        if not findings and hashlib.sha256(checksums.tobytes()).hexdigest() != recorded:
            findings.append(self._finding("is intact, but not the file that was committed"))
        return sorted(findings, key=lambda finding: -1 if finding.row is None else finding.row)

    def _check_index(self, index: NDArray[np.uint64]) -> tuple[list[Finding], list[tuple[int, int]]]:
        """Say what is wrong with an index ``[rows, V, 2]``, and list the (row of the shard, view) to read."""
        data_bytes = self.bytes - index_bytes(*self._shape)
        plain_bytes = None if self._spec.compressor else self._spec.row_bytes + CHECKSUM_BYTES
        findings = []
        sound = []
        first, stop = self._record.rows
        for (at, view), offset in np.ndenumerate(index[..., 0]):
            row = first + at
            missing = row >= stop or row in self._record.invalid
            if bool(offset == MISSING) != missing:
                found = "has no data" if not missing else "has data, but is invalid or no image's"
                findings.append(self._finding(f"{found}", row))
            if offset == MISSING:
                continue
            chunk_bytes = int(index[at, view, 1])
            inside = chunk_bytes > CHECKSUM_BYTES and int(offset) + chunk_bytes <= data_bytes
            if not inside or chunk_bytes != (plain_bytes or chunk_bytes):
                findings.append(self._finding("has an index that points outside its data", row))
                continue
            sound.append((at, view))
        return findings, sound


@contextmanager
def open_stored(path: CachePath, requests: Executor) -> Iterator[_Stored]:
    """Open a shard file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
    """
    if isinstance(path, RemotePath):
        yield _Object(path, requests)
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _File(descriptor)
    finally:
        os.close(descriptor)


class _File:
    """A file of a folder."""

    def __init__(self, descriptor: int) -> None:
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor

    def tail(self, size: int) -> bytes:
        return os.pread(self._descriptor, size, max(self.size - size, 0))

    def chunks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        buffer = memoryview(bytearray(max((size for _, size in ranges), default=0)))
        for number, (offset, size) in enumerate(ranges):
            count = os.preadv(self._descriptor, [buffer[:size]], offset)
            yield number, buffer[:count]


class _Object:
    """An object of a bucket."""

    def __init__(self, path: RemotePath, requests: Executor) -> None:
        self.size = path.file_bytes()
        self._path = path
        self._requests = requests

    def tail(self, size: int) -> bytes:
        size = min(size, self.size)
        return bytes(self._read(self.size - size, size)) if size else b""

    def chunks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        asked: deque[tuple[_Piece, Future[Any]]] = deque()
        try:
            for piece in _pieces(ranges):
                asked.append(
                    (piece, self._requests.submit(self._read, piece.start, piece.stop - piece.start))
                )
                if len(asked) > _AHEAD:
                    yield from _cut(ranges, *asked.popleft())
            while asked:
                yield from _cut(ranges, *asked.popleft())
        finally:
            for _, answer in asked:
                answer.cancel()

    def _read(self, start: int, length: int) -> Any:
        return self._path.bucket.read_range(self._path.name_in_bucket, start, length)


@dataclass
class _Piece:
    """Neighbouring chunks.

    Attributes:
        numbers: which ranges.
        start: offset of the first byte.
        stop: offset after the last.
    """

    numbers: list[int]
    start: int
    stop: int


def _pieces(ranges: Sequence[tuple[int, int]]) -> Iterator[_Piece]:
    """Group ranges in the order of their offsets, neighbours together.

    A group has at most `_PIECE` bytes, or one range.
    """
    piece: _Piece | None = None
    for number in sorted(range(len(ranges)), key=ranges.__getitem__):
        start, stop = ranges[number][0], sum(ranges[number])
        if piece is not None and start <= piece.stop + _GAP and stop - piece.start <= _PIECE:
            piece.numbers.append(number)
            piece.stop = max(piece.stop, stop)
            continue
        if piece is not None:
            yield piece
        piece = _Piece([number], start, stop)
    if piece is not None:
        yield piece


def _cut(
    ranges: Sequence[tuple[int, int]], piece: _Piece, answer: Future[Any]
) -> Iterator[tuple[int, memoryview]]:
    data = memoryview(answer.result())
    for number in piece.numbers:
        offset, size = ranges[number]
        yield number, data[offset - piece.start : offset - piece.start + size]
