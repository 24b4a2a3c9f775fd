"""Commit records: what makes a shard of a source exist.

``commits/<source>/<shard>.json`` is written after the shard files of all the source's columns are in place.
It holds nothing of when, where or by whom, so its bytes depend on the shard alone, and it holds its own
checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping  # noqa: TC003 - annotations are read when records are parsed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Len

from ..edge import MOST_BYTES, parse_json
from ..errors import CacheError
from ..storage.bucket import CachePath, file_bytes, map_files
from ..storage.files import os_errors, read_file
from ..storage.local import CHECKSUM_BYTES
from ..units import counted
from .bounds import MOST_COLUMNS, Bytes, Count, Rows, Sha256, Text
from .layout import canonical_json, commit_file, shard_file
from .shard_index import index_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .columns import ColumnSpec
    from .manifest import Manifest

_CHECKSUM = "sha256"
_REDO = "delete it and run the same `repa preprocess` again"


@dataclass(frozen=True, kw_only=True)
class ColumnRecord:
    """One column's shard file, as committed.

    Attributes:
        file_bytes: size of the file.
        chunks_sha256: sha256 over the stored crc32c of every row and view of a full shard, in order (uint32,
            little endian; four zero bytes for a missing chunk). The crc32c of a compressed chunk is that of
            its encoded bytes. Two intact shards differ here.
    """

    file_bytes: int
    chunks_sha256: str


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """One committed shard of a source.

    Attributes:
        shard: its index.
        rows: first row, and the row after the last.
        columns: name → what was written.
        invalid: row → why its image has no data.
    """

    shard: int
    rows: tuple[int, int]
    columns: Mapping[str, ColumnRecord]
    invalid: Mapping[int, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The record's file: canonical JSON with its own checksum, and a newline."""
        values = {
            "shard": self.shard,
            "rows": list(self.rows),
            "columns": {
                name: {"bytes": column.file_bytes, "chunks_sha256": column.chunks_sha256}
                for name, column in self.columns.items()
            },
            "invalid": {str(row): reason for row, reason in self.invalid.items()},
        }
        checksum = hashlib.sha256(canonical_json(values)).hexdigest()
        return canonical_json({**values, _CHECKSUM: checksum}) + b"\n"

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> CommitRecord:
        """The record in a file's bytes.

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
                    name: ColumnRecord(file_bytes=column.bytes, chunks_sha256=column.chunks_sha256)
                    for name, column in stored.columns.items()
                },
                invalid=stored.invalid,
            )
            intact = record.encode() == data and all(row in range(*record.rows) for row in record.invalid)
        except CacheError:
            intact = False
        if not intact:
            raise CacheError(f"commit record {where} is damaged", _REDO)
        return record


@dataclass(frozen=True, kw_only=True)
class _StoredColumn:
    bytes: Bytes
    chunks_sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A commit record as it is in its file."""

    shard: Count
    rows: tuple[Count, Rows]
    columns: Annotated[Mapping[str, _StoredColumn], Len(0, MOST_COLUMNS)]
    invalid: Mapping[int, Text]
    sha256: Sha256


def read_commit(path: CachePath, source: str, shard: int) -> CommitRecord | None:
    """The commit record of a shard, or None when it is not committed.

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

    Its shard must be one of the cache's, its rows that shard's, its columns the source's, and its files as
    large as their rows, where those are not compressed.

    Args:
        manifest: of the cache.
        columns: of the record's source, name → spec.
        record: the record.
    """
    rows = manifest.shard_range(record.shard)
    if record.rows != (rows.start, rows.stop) or not rows:
        return f"its rows are {record.rows}, the shard's are {(rows.start, rows.stop)}"
    if record.columns.keys() != columns.keys():
        return f"it has columns {sorted(record.columns)}, the source has {sorted(columns)}"
    views = len(manifest.views)
    chunks = views * (len(rows) - len(record.invalid))
    for name, spec in columns.items():
        expected = chunks * (spec.row_bytes + CHECKSUM_BYTES) + index_bytes(manifest.shard_rows, views)
        if spec.compressor is None and record.columns[name].file_bytes != expected:
            return f"its {name} has {record.columns[name].file_bytes:,} bytes, its rows take {expected:,}"
    return None


def record_problem(
    path: CachePath,
    manifest: Manifest,
    source: str,
    record: CommitRecord,
    columns: Mapping[str, ColumnSpec] | None = None,
) -> str | None:
    """What keeps a record from standing for its shard, or None: rows, columns, or a file's presence and size.

    Args:
        path: folder of the cache.
        manifest: its manifest.
        source: name of the source.
        record: the record, itself intact.
        columns: of the source, where they are at hand.
    """
    columns = manifest.source_columns(source) if columns is None else columns
    if problem := record_misfit(manifest, columns, record):
        return problem
    for name, column in record.columns.items():
        file = shard_file(path, name, columns[name], record.shard)
        with os_errors("read", file):
            try:
                found = file_bytes(file)
            except FileNotFoundError:
                return f"{file} is missing"
        if found != column.file_bytes:
            return f"{file} has {counted(found, 'byte')} of {column.file_bytes}"
    return None


def is_committed(path: CachePath, manifest: Manifest, source: str, shard: int) -> bool:
    """Whether a shard has an intact record and files of the recorded sizes; if not, it is to be written."""
    try:
        record = read_commit(path, source, shard)
    except CacheError:
        return False
    return record is not None and record_problem(path, manifest, source, record) is None


def committed_shards(path: CachePath, manifest: Manifest, source: str) -> list[int]:
    """The shards of a source that are committed (see `is_committed`), ascending."""
    committed = map_files(
        lambda shard: is_committed(path, manifest, source, shard), range(manifest.num_shards), path
    )
    return [shard for shard, found in enumerate(committed) if found]


def invalid_reasons(path: CachePath, manifest: Manifest) -> dict[int, str]:
    """Row → reason of every row that some source has marked invalid, ascending by row.

    Raises:
        CacheError: a commit record is damaged; the rows it marks are not known then.
    """
    return survey(path, manifest).invalid_reasons()


def invalid_rows(path: CachePath, manifest: Manifest) -> NDArray[np.int64]:
    """The rows of `invalid_reasons`, int64, ascending: the union over all sources.

    Raises:
        CacheError: a commit record is damaged.
    """
    return survey(path, manifest).invalid_rows()


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the commit records of a cache say, each read once.

    Attributes:
        records: source → the intact record of every shard that has one of this cache, ascending.
        absent: source → shards that are not committed (see `is_committed`), ascending.
        damaged: what is wrong with records that are not intact.
        file_bytes: column → bytes of its recorded shards.
    """

    records: Mapping[str, Sequence[CommitRecord]]
    absent: Mapping[str, Sequence[int]]
    damaged: Sequence[CacheError]
    file_bytes: Mapping[str, int]

    def invalid_reasons(self) -> dict[int, str]:
        """Row → reason of every row that some source has marked invalid, ascending by row.

        Raises:
            CacheError: a commit record is damaged; the rows it marks are not known then.
        """
        for error in self.damaged:
            raise error
        reasons: dict[int, str] = {}
        for records in self.records.values():
            for record in records:
                for row, reason in record.invalid.items():
                    reasons.setdefault(row, reason)
        return dict(sorted(reasons.items()))

    def invalid_rows(self) -> NDArray[np.int64]:
        """The rows of `invalid_reasons`, int64, ascending.

        Raises:
            CacheError: as there.
        """
        return np.array(list(self.invalid_reasons()), dtype=np.int64)


def survey(path: CachePath, manifest: Manifest) -> Survey:
    """Read the commit records of all sources, and look at the files they stand for.

    Raises:
        RepaError: the operating system refuses.
    """
    records: dict[str, list[CommitRecord]] = {}
    absent: dict[str, list[int]] = {}
    damaged: list[CacheError] = []
    sizes = dict.fromkeys(manifest.columns, 0)

    for source in manifest.sources:
        columns = manifest.source_columns(source)

        def look(
            shard: int, source: str = source, columns: Mapping[str, ColumnSpec] = columns
        ) -> tuple[CommitRecord | CacheError | None, bool]:
            try:
                record = read_commit(path, source, shard)
            except CacheError as error:
                return error, False
            if record is None or record_misfit(manifest, columns, record):
                return None, False
            return record, record_problem(path, manifest, source, record, columns) is None

        found = map_files(look, range(manifest.num_shards), path)
        absent[source] = [shard for shard, (_, committed) in enumerate(found) if not committed]
        damaged += [record for record, _ in found if isinstance(record, CacheError)]
        records[source] = [record for record, _ in found if isinstance(record, CommitRecord)]
        for record in records[source]:
            for name, column in record.columns.items():
                sizes[name] += column.file_bytes
    return Survey(records=records, absent=absent, damaged=damaged, file_bytes=sizes)
