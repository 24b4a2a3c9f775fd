"""Writing the columns of a source, shard by shard, each there whole or not at all.

A shard file is assembled by hand in Zarr's public layout (see `shard_index`): rows are appended as they come,
so no shard is ever held in memory, and one fsync is enough. Rows of a compressed column are encoded as they
come, in the thread that appends them.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

import numpy as np
from crc32c import crc32c

from ..errors import CacheError
from ..format.commits import ColumnRecord, CommitRecord, is_committed
from ..format.compression import chunk_codec
from ..format.layout import LOCK_FILE, commit_file, commit_folder, shard_file
from ..format.shard_index import MISSING, encode_index, index_bytes
from ..storage.bucket import look_again, map_files
from ..storage.files import os_errors
from ..storage.folder import ChangedError, TakenError, unless_changed
from ..storage.local import CHECKSUM_BYTES
from ..storage.writable import open_writable
from .valid_rows import settle_valid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from numpy.typing import NDArray

    from ..format.columns import ColumnSpec
    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath
    from ..storage.folder import Claim, FileInMaking, Folder


class ShardTakenError(CacheError):
    """A shard that another process is writing."""


class SourceWriter:
    """The one writer of some shards of a source. As a context manager it holds their locks.

    On a disk a lock is one byte per shard of ``commits/<source>/.lock``, so processes that own different
    shards coexist and no two can own the same. Locks end with the process, however it ends; in a bucket, if
    it was killed on another machine, a minute later (`leases`). A process has one writer of a source.

    Args:
        path: folder of the cache.
        manifest: its manifest, with the source declared (`store.ensure_source`).
        source: name of the source.
        shards: the shards to own.

    Raises:
        CacheError: on entering, when a shard is another writer's; the source is not declared.
        ValueError: a shard outside the cache.
    """

    def __init__(self, path: CachePath, manifest: Manifest, source: str, shards: Iterable[int]) -> None:
        self.path = path
        self.manifest = manifest
        self.source = source
        self.shards = sorted(set(shards))
        if source not in manifest.sources:
            raise CacheError(f"cache {path} has no source {source}", "declare it before writing it")
        if self.shards and not 0 <= self.shards[0] <= self.shards[-1] < manifest.num_shards:
            raise ValueError(f"shards {self.shards[0]} to {self.shards[-1]} of {manifest.num_shards}")
        self._claim: Claim | None = None

    def __enter__(self) -> Self:
        folder = commit_folder(self.path, self.source)
        with os_errors("write", folder / LOCK_FILE):
            try:
                self._claim = open_writable(self.path).claim(folder, self.shards)
            except TakenError as error:
                if error.number is None:
                    raise CacheError(
                        f"this process is already writing {self.source} in {self.path}",
                        "wait until it is done",
                    ) from error
                raise ShardTakenError(
                    f"another process is writing shard {error.number} of {self.source} in {self.path}",
                    "wait until it has finished, or stop it",
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.release()

    @property
    def remaining(self) -> list[int]:
        """The owned shards that are not committed, ascending."""
        look_again(self.path)
        committed = map_files(
            lambda shard: is_committed(self.path, self.manifest, self.source, shard), self.shards, self.path
        )
        return [shard for shard, found in zip(self.shards, committed, strict=True) if not found]

    def shard(self, shard: int) -> ShardWriter:
        """Make a writer of one owned shard. One that is committed is written anew.

        Raises:
            ValueError: the shard is not owned, or the locks are not held.
        """
        if self._claim is None or shard not in self.shards:
            raise ValueError(f"shard {shard} of {self.source} is not owned by this writer")
        return ShardWriter(self.path, self.manifest, self.source, shard, self._claim.check)

    def withdraw(self, shard: int) -> None:
        """Take one owned shard back. Afterwards it is not committed, and its files are gone.

        Raises:
            ValueError: the shard is not owned, or the locks are not held.
            CacheError: others have taken this process for dead.
            RepaError: the operating system refuses.
        """
        if self._claim is None or shard not in self.shards:
            raise ValueError(f"shard {shard} of {self.source} is not owned by this writer")
        folder, record = open_writable(self.path), commit_file(self.path, self.source, shard)
        specs = self.manifest.source_columns(self.source)
        files = [shard_file(self.path, column, spec, shard) for column, spec in specs.items()]
        with os_errors("write", record):
            folder.require_inside(files)
            seen = folder.seen(record)
            self._claim.check()
            with unless_changed(record):
                # before a file goes: a record must never stand beside files that it was not made from
                folder.withdraw(record, seen)
            for file in files:
                self._claim.check()
                folder.remove([file])
            if self.manifest.format_version > 1:
                with folder.locked(self.path / LOCK_FILE, shard):
                    settle_valid(self.path, shard)


class ShardWriter:
    """One shard of a source. As a context manager it leaves nothing behind without `commit`.

    Args:
        path: folder of the cache.
        manifest: its manifest.
        source: name of the source.
        shard: index of the shard, whose lock the caller holds (`SourceWriter.shard`).
        check: looks whether it is held still.
    """

    def __init__(
        self, path: CachePath, manifest: Manifest, source: str, shard: int, check: Callable[[], None]
    ) -> None:
        self.path = path
        self._folder = open_writable(path)
        self._check = check
        self.source = source
        self.number = shard
        self.rows = manifest.shard_range(shard)
        self._specs = manifest.source_columns(source)
        self._layout = (self.rows.start, manifest.shard_rows, len(manifest.views))
        self._whose = (
            {"cache": manifest.identity, "source": manifest.source_identities[source]}
            if manifest.format_version > 1
            else {}
        )
        self._files: dict[str, _ColumnFile] = {}
        self._invalid: dict[int, str] = {}

    def __enter__(self) -> Self:
        record = commit_file(self.path, self.source, self.number)
        with os_errors("write", record):
            self._seen = self._folder.seen(record)
        try:
            for column, spec in self._specs.items():
                path = shard_file(self.path, column, spec, self.number)
                with os_errors("write", path):
                    self._files[column] = _ColumnFile(path, self._folder, spec, *self._layout)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon()

    def write(self, row: int, column: str, array: NDArray[np.generic]) -> None:
        """Append a row to a column.

        Args:
            row: index of the image in the cache; ascending within a column.
            column: name of the column.
            array: ``[V, *shape]`` of the column's dtype.

        Raises:
            ValueError: a row, shape or dtype that is not the column's, a row invalid or not ascending.
            RepaError: the operating system refuses.
        """
        if row not in self.rows or row in self._invalid:
            raise ValueError(f"row {row} is invalid or not of shard {self.number} ({self.rows})")
        file = self._files[column]
        with os_errors("write", file.path):
            file.append(row, array)

    def mark_invalid(self, row: int, reason: str) -> None:
        """Say that a row has no data.

        Args:
            row: index of the image in the cache.
            reason: why, in words that do not depend on the machine.

        Raises:
            ValueError: the row is not of this shard, or a column has it already.
        """
        if row not in self.rows or any(file.has(row) for file in self._files.values()):
            raise ValueError(f"row {row} is written already or not of shard {self.number} ({self.rows})")
        self._invalid[row] = reason

    def commit(self) -> None:
        """Rename the files to their final paths and write the commit record.

        Raises:
            ValueError: a row is neither written in every column nor invalid.
            RepaError: the operating system refuses; the shard is not committed then.
        """
        for column, file in self._files.items():
            for row in self.rows:
                if row not in self._invalid and not file.has(row):
                    raise ValueError(f"row {row} of {column} is neither written nor invalid")
        columns = {}
        for column, file in self._files.items():
            with os_errors("write", file.path):
                columns[column] = file.finish(with_table=bool(self._whose))
        record_file = commit_file(self.path, self.source, self.number)
        self._check()
        with os_errors("write", record_file):
            # a record must never stand beside files it was not made from, not even after a crash
            with self._unless_written_by_another():
                self._seen = self._folder.withdraw(record_file, self._seen)
            map_files(_ColumnFile.publish, self._files.values(), self.path)
            record = CommitRecord(
                shard=self.number,
                rows=(self.rows.start, self.rows.stop),
                columns=columns,
                invalid=self._invalid,
                **self._whose,
            )
            self._publish(record_file, record)

    def _publish(self, file: CachePath, record: CommitRecord) -> None:
        """Write the record, and before it what Zarr readers are told of its rows."""
        if record.format_version == 1:
            self._write_record(file, record)
            return
        # another source's record of these rows must not come in between
        with self._folder.locked(self.path / LOCK_FILE, self.number):
            settle_valid(self.path, self.number, {self.source: record})
            self._write_record(file, record)

    def _write_record(self, file: CachePath, record: CommitRecord) -> None:
        self._check()
        with self._unless_written_by_another():
            self._folder.put_if(file, record.encode(), self._seen)

    @contextmanager
    def _unless_written_by_another(self) -> Iterator[None]:
        try:
            yield
        except ChangedError as error:
            raise ShardTakenError(
                f"another process has written shard {self.number} of {self.source} in {self.path} meanwhile",
                "run the same command again, which looks at it",
            ) from error

    def _abandon(self) -> None:
        with ExitStack() as stack:
            for file in self._files.values():
                stack.callback(file.abandon)


class _ColumnFile:
    """A shard file in the making, in the layout of its rows and index.

    Args:
        path: where it belongs.
        folder: what writes the cache.
        spec: the column's.
        first_row: of the shard.
        shard_rows: rows of a full shard.
        views: V.
    """

    def __init__(
        self, path: CachePath, folder: Folder, spec: ColumnSpec, first_row: int, shard_rows: int, views: int
    ) -> None:
        self.path = path
        self._shape = (views, *spec.shape)
        self._dtype = spec.numpy_dtype
        self._codec = chunk_codec(spec)
        self._first_row = first_row
        self._next_row = first_row
        self._offset = 0
        self._index = np.full((shard_rows, views, 2), MISSING, dtype=np.uint64)
        self._checksums = np.zeros((shard_rows, views), dtype="<u4")
        most = shard_rows * views * (spec.row_bytes + CHECKSUM_BYTES) + index_bytes(shard_rows, views)
        self._file: FileInMaking = folder.begin(path, most)

    def has(self, row: int) -> bool:
        return bool(self._index[row - self._first_row, 0, 0] != MISSING)

    def append(self, row: int, array: NDArray[np.generic]) -> None:
        if array.shape != self._shape or array.dtype != self._dtype:
            raise ValueError(
                f"row {row} is {array.dtype}{list(array.shape)}, its column {self._dtype}{list(self._shape)}"
            )
        if row < self._next_row:
            raise ValueError(
                f"row {row} comes after row {self._next_row - 1}; rows are written in ascending order"
            )
        pieces: list[memoryview | bytes] = []
        for view, values in enumerate(array):
            data = self._stored_bytes(values)
            checksum = crc32c(data)
            pieces += [data, checksum.to_bytes(CHECKSUM_BYTES, "little")]
            self._index[row - self._first_row, view] = (self._offset, len(data) + CHECKSUM_BYTES)
            self._checksums[row - self._first_row, view] = checksum
            self._offset += len(data) + CHECKSUM_BYTES
        self._file.append(pieces)
        self._next_row = row + 1

    def _stored_bytes(self, values: NDArray[np.generic]) -> memoryview | bytes:
        if self._codec is not None:
            return self._codec.encode(values)
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data

    def finish(self, *, with_table: bool) -> ColumnRecord:
        # the index goes last, so its offsets are known, and one fsync covers rows and index
        index = encode_index(self._index)
        self._file.append([index])
        self._file.finish()
        return ColumnRecord(
            file_bytes=self._offset + len(index),
            chunks_sha256=hashlib.sha256(self._checksums.tobytes()).hexdigest(),
            chunks_crc32c=self._checksums.tobytes() if with_table else b"",
            index_crc32c=int.from_bytes(index[-CHECKSUM_BYTES:], "little") if with_table else None,
        )

    def publish(self) -> None:
        self._file.publish()

    def abandon(self) -> None:
        self._file.abandon()
