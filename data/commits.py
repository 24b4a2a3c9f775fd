"""Commit records: what makes a shard of a source exist.

``commits/<source>/<shard>.json`` is written after the shard files of all the source's columns are in place.
It holds nothing of when, where or by whom, so its bytes depend on the shard alone, and it holds its own
checksum.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .errors import CacheError
from .files import os_errors
from .layout import canonical_json, commit_file, shard_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from .schema import Manifest

_CHECKSUM = "sha256"


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
            values = json.loads(data)
            record = cls(
                shard=values["shard"],
                rows=(values["rows"][0], values["rows"][1]),
                columns={
                    name: ColumnRecord(file_bytes=column["bytes"], chunks_sha256=column["chunks_sha256"])
                    for name, column in values["columns"].items()
                },
                invalid={int(row): reason for row, reason in values["invalid"].items()},
            )
            intact = record.encode() == data
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            intact = False
        if not intact:
            raise CacheError(
                f"commit record {where} is damaged; delete it and run the same `repa preprocess` again"
            )
        return record


def read_commit(path: Path, source: str, shard: int) -> CommitRecord | None:
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
            data = file.read_bytes()
        except FileNotFoundError:
            return None
    record = CommitRecord.decode(data, where=str(file))
    if record.shard != shard:
        raise CacheError(
            f"commit record {file} is the one of shard {record.shard}; "
            "delete it and run the same `repa preprocess` again"
        )
    return record


def record_problem(path: Path, manifest: Manifest, source: str, record: CommitRecord) -> str | None:
    """What keeps a record from standing for its shard, or None: rows, columns, or a file's presence and size.

    Args:
        path: folder of the cache.
        manifest: its manifest.
        source: name of the source.
        record: the record, itself intact.
    """
    rows = manifest.shard_range(record.shard)
    columns = manifest.source_columns(source)
    if record.rows != (rows.start, rows.stop):
        return f"its rows are {record.rows}, the shard's are {(rows.start, rows.stop)}"
    if record.columns.keys() != columns.keys():
        return f"it has columns {sorted(record.columns)}, the source has {sorted(columns)}"
    for name, column in record.columns.items():
        file = shard_file(path, name, columns[name], record.shard)
        with os_errors("read", file):
            try:
                file_bytes = file.stat().st_size
            except FileNotFoundError:
                return f"{file} is missing"
        if file_bytes != column.file_bytes:
            return f"{file} has {file_bytes} bytes of {column.file_bytes}"
    return None


def is_committed(path: Path, manifest: Manifest, source: str, shard: int) -> bool:
    """Whether a shard has an intact record and files of the recorded sizes; if not, it is to be written."""
    try:
        record = read_commit(path, source, shard)
    except CacheError:
        return False
    return record is not None and record_problem(path, manifest, source, record) is None


def committed_shards(path: Path, manifest: Manifest, source: str) -> list[int]:
    """The shards of a source that are committed (see `is_committed`), ascending."""
    return [shard for shard in range(manifest.num_shards) if is_committed(path, manifest, source, shard)]


def invalid_reasons(path: Path, manifest: Manifest) -> dict[int, str]:
    """Row → reason of every row that some source has marked invalid, ascending by row.

    Raises:
        CacheError: a commit record is damaged; the rows it marks are not known then.
    """
    reasons: dict[int, str] = {}
    for source in manifest.sources:
        for shard in range(manifest.num_shards):
            record = read_commit(path, source, shard)
            if record is not None:
                reasons = {**record.invalid, **reasons} if record.invalid else reasons
    return dict(sorted(reasons.items()))


def invalid_rows(path: Path, manifest: Manifest) -> NDArray[np.int64]:
    """The rows of `invalid_reasons`, int64, ascending: the union over all sources.

    Raises:
        CacheError: a commit record is damaged.
    """
    return np.array(list(invalid_reasons(path, manifest)), dtype=np.int64)
