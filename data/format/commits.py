"""Commit records, which make a shard of a source exist and tell it from every other.

``commits/<source>/<shard>.json`` is written after the shard files of all the source's columns are in place.
It holds nothing of when, where or by whom, so its bytes depend on the shard alone, and it holds its own
checksum. From format version 2 on it says whose it is, by the identities of its cache and of its source's
declaration, and has the checksum of every row: an intact file under the wrong name is not taken for the right
one. The files themselves are the same in both versions.
"""

from __future__ import annotations

import hashlib
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping  # noqa: TC003 - annotations are read when records are parsed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Len, Lt

from ..edge import MOST_BYTES, parse_json
from ..errors import CacheError
from ..storage.bucket import CachePath, file_bytes
from ..storage.files import os_errors, read_file
from ..storage.local import CHECKSUM_BYTES
from ..units import counted
from .bounds import MOST_COLUMNS, Bytes, Count, Rows, Sha256, Text
from .canonical import canonical_json
from .columns import source_of
from .layout import commit_file, shard_file
from .shard_index import index_bytes

if TYPE_CHECKING:
    from .columns import ColumnSpec
    from .manifest import Manifest

_AFTER = b',"shard":'
_REDO = "delete it and run the same `repa preprocess` again"


@dataclass(frozen=True, kw_only=True)
class ColumnRecord:
    """One column's shard file, as committed.

    Attributes:
        file_bytes: size of the file.
        chunks_sha256: sha256 over the stored crc32c of every row and view of a full shard, in order (uint32,
            little endian; four zero bytes for a missing chunk). The crc32c of a compressed chunk is that of
            its encoded bytes. Two intact shards differ here.
        chunks_crc32c: what is hashed there, ``uint32 [rows of a full shard, V]``; empty in format version 1.
        index_crc32c: the last four bytes of the file; None in format version 1. Shards of equal shape have
            equal indexes where they are not compressed, so this alone tells little.
    """

    file_bytes: int
    chunks_sha256: str
    chunks_crc32c: bytes = b""
    index_crc32c: int | None = None


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """One committed shard of a source.

    Attributes:
        shard: its index.
        rows: first row, and the row after the last.
        columns: name → what was written.
        invalid: row → why its image has no data.
        cache: identity of the cache it belongs to, see `Manifest.identity`; empty in format version 1.
        source: identity of its source's declaration, see `Manifest.source_identities`; empty likewise.
    """

    shard: int
    rows: tuple[int, int]
    columns: Mapping[str, ColumnRecord]
    invalid: Mapping[int, str] = field(default_factory=dict)
    cache: str = ""
    source: str = ""

    @property
    def format_version(self) -> int:
        """Version of the record. A cache that is half upgraded has both."""
        return 2 if self.cache else 1

    def encode(self) -> bytes:
        """Write the record's file as canonical JSON with its own checksum and a newline."""
        columns: dict[str, dict[str, Any]] = {
            name: {"bytes": column.file_bytes, "chunks_sha256": column.chunks_sha256}
            for name, column in self.columns.items()
        }
        values: dict[str, Any] = {
            "shard": self.shard,
            "rows": list(self.rows),
            "columns": columns,
            "invalid": {str(row): reason for row, reason in self.invalid.items()},
        }
        if self.format_version > 1:
            values |= {"cache": self.cache, "source": self.source}
            for name, column in self.columns.items():
                columns[name]["chunks_crc32c"] = b64encode(column.chunks_crc32c).decode()
                columns[name]["index_crc32c"] = column.index_crc32c
        plain = canonical_json(values)
        checksum = hashlib.sha256(plain).hexdigest()
        # the checksum is inserted where sorted keys put it: making the JSON a second time, with its large
        # table of checksums, would take as long as reading the record
        head, tail = plain.rsplit(_AFTER, 1)
        return b"".join((head, f',"sha256":"{checksum}"'.encode(), _AFTER, tail, b"\n"))

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> CommitRecord:
        """Parse the record in a file's bytes.

        Args:
            data: the bytes.
            where: the file's path, for the error.

        Raises:
            CacheError: any byte is not what `encode` wrote.
        """
        try:
            stored = parse_json(_Stored, data, where=where)
            record = cls(
                shard=stored.shard,
                rows=stored.rows,
                columns={
                    name: ColumnRecord(
                        file_bytes=column.bytes,
                        chunks_sha256=column.chunks_sha256,
                        chunks_crc32c=b64decode(column.chunks_crc32c),
                        index_crc32c=column.index_crc32c,
                    )
                    for name, column in stored.columns.items()
                },
                invalid=stored.invalid,
                cache=stored.cache,
                source=stored.source,
            )
            # there is one way to write a record, so this compares the checksum and every other byte
            intact = record.encode() == data and all(row in range(*record.rows) for row in record.invalid)
        except (CacheError, ValueError):
            intact = False
        if not intact:
            raise CacheError(f"commit record {where} is damaged", _REDO)
        return record


@dataclass(frozen=True, kw_only=True)
class _StoredColumn:
    bytes: Bytes
    chunks_sha256: Sha256
    chunks_crc32c: str = ""
    index_crc32c: Annotated[int, Ge(0), Lt(2**32)] | None = None


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A commit record as it is in its file."""

    shard: Count
    rows: tuple[Count, Rows]
    columns: Annotated[Mapping[str, _StoredColumn], Len(0, MOST_COLUMNS)]
    invalid: Mapping[int, Text]
    sha256: Sha256
    cache: Annotated[str, Len(0, 64)] = ""
    source: Annotated[str, Len(0, 64)] = ""


@dataclass(frozen=True, kw_only=True)
class ShardProblem:
    """What keeps a record from standing for its shard.

    Attributes:
        what: a clause that names the file.
        column: the column, where it is about one.
        foreign: whether something else stands under its name, and not nothing or a file cut short.
    """

    what: str
    column: str = ""
    foreign: bool = False


def read_commit(path: CachePath, source: str, shard: int) -> CommitRecord | None:
    """Read the commit record of a shard, or None when it is not committed.

    Args:
        path: folder of the cache.
        source: name of the source.
        shard: index of the shard.

    Raises:
        CacheError: the record is damaged, or belongs to another shard.
    """
    file = commit_file(path, source, shard)
    with os_errors("read", file):
        try:
            data = read_file(file, MOST_BYTES)
        except FileNotFoundError:
            return None
    record = CommitRecord.decode(data, where=str(file))
    if record.shard != shard:
        raise CacheError(
            f"commit record {file} is the one of shard {record.shard}",
            _REDO,
        )
    return record


def record_misfit(manifest: Manifest, columns: Mapping[str, ColumnSpec], record: CommitRecord) -> str | None:
    """Return what keeps an intact record from being of a cache at all, None where nothing does.

    Its shard must be one of the cache's, its rows that shard's, its columns the source's, its files as large
    as their rows, where those are not compressed, and cache and source the ones that it names.

    Args:
        manifest: of the cache.
        columns: of the record's source, name → spec.
        record: the record.
    """
    rows = manifest.shard_range(record.shard)
    if record.rows != (rows.start, rows.stop) or not rows:
        return f"its rows are {record.rows}, the shard's are {(rows.start, rows.stop)}"
    if not columns or record.columns.keys() != columns.keys():
        return f"it has columns {sorted(record.columns)}, the source has {sorted(columns)}"
    views = len(manifest.views)
    chunks = views * (len(rows) - len(record.invalid))
    for name, spec in columns.items():
        column = record.columns[name]
        expected = chunks * (spec.row_bytes + CHECKSUM_BYTES) + index_bytes(manifest.shard_rows, views)
        if spec.compressor is None and column.file_bytes != expected:
            return f"its {name} has {column.file_bytes:,} bytes, its rows take {expected:,}"
        whole = len(column.chunks_crc32c) == 4 * manifest.shard_rows * views
        if record.format_version > 1 and not (whole and column.index_crc32c is not None):
            return f"its {name} has checksums of {len(column.chunks_crc32c) // 4} chunks"
    return _foreign(manifest, columns, record)


def _foreign(manifest: Manifest, columns: Mapping[str, ColumnSpec], record: CommitRecord) -> str | None:
    """Say what shows that a record is another cache's, or of other weights or settings."""
    if record.format_version == 1:
        return None if manifest.format_version == 1 else "it does not say whose it is"
    # an upgrade rewrites the records first and the manifest last, so both versions stand together meanwhile
    if manifest.format_version > 1 and record.cache != manifest.identity:
        return "it is of another cache"
    source = source_of(next(iter(columns)))
    if record.source != manifest.source_identities[source]:
        return f"it is of {source} from another model or in another form"
    return None


def record_problem(
    path: CachePath,
    manifest: Manifest,
    source: str,
    record: CommitRecord,
    columns: Mapping[str, ColumnSpec] | None = None,
) -> ShardProblem | None:
    """Return what keeps a record from standing for its shard, None where nothing does.

    A file must be there, as large as recorded, and end in the recorded checksums of its last chunk and of its
    index. That tells one shard from another at the price of a small read; the checksums of the other rows are
    compared when they are read. In a bucket, where a small read is a request, the file's end is left to that.

    Args:
        path: folder of the cache.
        manifest: its manifest.
        source: name of the source.
        record: the record, itself intact.
        columns: of the source, where they are at hand.
    """
    columns = manifest.source_columns(source) if columns is None else columns
    if problem := record_misfit(manifest, columns, record):
        return ShardProblem(
            what=f"commit record {commit_file(path, source, record.shard)} is not its own: {problem}",
            foreign=True,
        )
    for name, column in record.columns.items():
        file = shard_file(path, name, columns[name], record.shard)
        with os_errors("read", file):
            try:
                found = _end_of(file, manifest) if isinstance(file, Path) else (file_bytes(file), None, None)
            except FileNotFoundError:
                return ShardProblem(what=f"{file} is missing", column=name)
        size, last, index = found
        if size != column.file_bytes:
            return ShardProblem(
                what=f"{file} has {counted(size, 'byte')} of {column.file_bytes}", column=name
            )
        if index is not None and column.index_crc32c is not None:
            expected = _last_checksum(manifest, record, column)
            if index != column.index_crc32c or last not in (expected, None):
                what = f"{file} is not the file that was committed there"
                return ShardProblem(what=what, column=name, foreign=True)
    return None


def _end_of(file: Path, manifest: Manifest) -> tuple[int, int | None, int | None]:
    """Return the size of a shard file, the checksums of its last chunk and of its index, or None."""
    # without waiting: a FIFO under its name would hold the command up for ever
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size = os.fstat(descriptor).st_size
        before_index = size - index_bytes(manifest.shard_rows, len(manifest.views))
        if before_index < 0:
            return size, None, None
        index = os.pread(descriptor, CHECKSUM_BYTES, size - CHECKSUM_BYTES)
        last = os.pread(descriptor, CHECKSUM_BYTES, before_index - CHECKSUM_BYTES) if before_index else None
    finally:
        os.close(descriptor)
    return size, None if last is None else int.from_bytes(last, "little"), int.from_bytes(index, "little")


def _last_checksum(manifest: Manifest, record: CommitRecord, column: ColumnRecord) -> int | None:
    """Return the recorded checksum of the last chunk of a file, or None where it has none."""
    start, stop = record.rows
    row = next((row for row in reversed(range(start, stop)) if row not in record.invalid), None)
    if row is None:
        return None
    end = 4 * (row - start + 1) * len(manifest.views)
    return int.from_bytes(column.chunks_crc32c[end - 4 : end], "little")


def is_committed(path: CachePath, manifest: Manifest, source: str, shard: int) -> bool:
    """Tell whether a shard has an intact record and files of the recorded sizes.

    If not, it is to be written.
    """
    try:
        record = read_commit(path, source, shard)
    except CacheError:
        return False
    return record is not None and record_problem(path, manifest, source, record) is None
