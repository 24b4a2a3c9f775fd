"""The survey of a cache's commit records, which tells the shards that exist and the rows that are invalid."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - annotations are read when records are parsed
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CacheError
from ..storage.bucket import CachePath, look_again, map_files
from .commits import CommitRecord, ShardProblem, is_committed, read_commit, record_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .columns import ColumnSpec
    from .manifest import Manifest


def committed_shards(path: CachePath, manifest: Manifest, source: str) -> list[int]:
    """List the shards of a source that are committed (see `is_committed`), ascending."""
    look_again(path)
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
    """List the rows of `invalid_reasons`, int64, ascending. They are the union over all sources.

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
        foreign: source → shard → what stands where a committed one should, ascending.
        damaged: what is wrong with records that are not intact.
        file_bytes: column → bytes of its recorded shards.
    """

    records: Mapping[str, Sequence[CommitRecord]]
    absent: Mapping[str, Sequence[int]]
    foreign: Mapping[str, Mapping[int, ShardProblem]]
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
        """List the rows of `invalid_reasons`, int64, ascending.

        Raises:
            CacheError: as there.
        """
        return np.array(list(self.invalid_reasons()), dtype=np.int64)


def survey(path: CachePath, manifest: Manifest) -> Survey:
    """Read the commit records of all sources, and look at the files they stand for.

    Raises:
        RepaError: the operating system refuses.
    """
    look_again(path)
    records: dict[str, list[CommitRecord]] = {}
    absent: dict[str, list[int]] = {}
    foreign: dict[str, dict[int, ShardProblem]] = {}
    damaged: list[CacheError] = []
    sizes = dict.fromkeys(manifest.columns, 0)

    for source in manifest.sources:
        columns = manifest.source_columns(source)

        def look(
            shard: int, source: str = source, columns: Mapping[str, ColumnSpec] = columns
        ) -> tuple[CommitRecord | CacheError | None, ShardProblem | None]:
            try:
                record = read_commit(path, source, shard)
            except CacheError as error:
                return error, None
            if record is None:
                return None, None
            return record, record_problem(path, manifest, source, record, columns)

        found = map_files(look, range(manifest.num_shards), path)
        absent[source] = [
            shard
            for shard, (record, problem) in enumerate(found)
            if not isinstance(record, CommitRecord) or problem is not None
        ]
        foreign[source] = {
            shard: problem
            for shard, (_, problem) in enumerate(found)
            if problem is not None and problem.foreign
        }
        damaged += [record for record, _ in found if isinstance(record, CacheError)]
        records[source] = [
            record
            for record, problem in found
            # a record of another cache or shard is left out; one whose files are wrong counts
            if isinstance(record, CommitRecord) and (problem is None or problem.column)
        ]
        for record in records[source]:
            for name, column in record.columns.items():
                sizes[name] += column.file_bytes
    return Survey(records=records, absent=absent, foreign=foreign, damaged=damaged, file_bytes=sizes)


def row_checksums(
    manifest: Manifest, column: str, records: Sequence[CommitRecord]
) -> NDArray[np.uint32] | None:
    """Return the recorded checksums ``[S · rows of a shard, V]`` of a column wholly committed.

    None where a record has none: it was written before records had them.
    """
    tables = [record.columns[column].chunks_crc32c for record in records]
    if not all(tables):
        return None
    return np.frombuffer(b"".join(tables), dtype="<u4").reshape(-1, len(manifest.views))
