"""Copying the rows of shards from the caches where they are."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RepaError
from ..format.commits import is_committed
from ..format.survey import invalid_reasons
from ..units import human_bytes
from ..writing.writer import SourceWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    from numpy.typing import NDArray

    from ..format.manifest import Manifest
    from ..reading.reader import CacheReader
    from ..writing.writer import ShardWriter
    from .parts import Part

COPY_THREADS = 4

_AT_ONCE = 32 * 2**20  # bytes of a column that are held while they are copied


def check_room(out: Path, manifest: Manifest, sources: Sequence[str]) -> None:
    """Refuse a disk that the shards that are not there yet would fill.

    Args:
        out: folder of the whole.
        manifest: its manifest.
        sources: that are joined.

    Raises:
        RepaError: how much is to be copied, and what is free.
    """
    needed = 0
    for source in sources:
        row_bytes = sum(spec.row_bytes for spec in manifest.source_columns(source).values())
        rows = sum(
            len(manifest.shard_range(shard))
            for shard in range(manifest.num_shards)
            if not is_committed(out, manifest, source, shard)
        )
        packed = any(spec.compressor for spec in manifest.source_columns(source).values())
        # how far a source is compressed shows when it is written
        needed += 0 if packed else rows * row_bytes * len(manifest.views)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise RepaError(
            f"{human_bytes(needed)} are to be copied to {out}, its disk has {human_bytes(free)} free",
            "free some, or name another disk with --cache",
        )


class RowCopier:
    """Copies shards of the whole, row by row from where they are.

    Args:
        out: folder of the whole.
        parts: the parts.
        readers: of each.
        origin: part and row of every row of the whole.
        pool: reads.
    """

    def __init__(
        self,
        out: Path,
        parts: Sequence[Part],
        readers: Sequence[CacheReader],
        origin: NDArray[np.int64],
        pool: ThreadPoolExecutor,
    ) -> None:
        self._out = out
        self._readers = readers
        self._origin = origin
        self._pool = pool
        self._reasons = [invalid_reasons(part.path, part.manifest) for part in parts]

    def copy(self, manifest: Manifest, source: str) -> Iterator[int]:
        """Write the shards of a source that are not there. It yields rows done, shard by shard."""
        with SourceWriter(self._out, manifest, source, range(manifest.num_shards)) as writer:
            remaining = frozenset(writer.remaining)
            for number in writer.shards:
                if number in remaining:
                    with writer.shard(number) as shard:
                        self._copy_shard(manifest, source, shard)
                        shard.commit()
                yield len(manifest.shard_range(number))

    def _copy_shard(self, manifest: Manifest, source: str, shard: ShardWriter) -> None:
        valid = []
        for row in shard.rows:
            number, there = self._origin[row].tolist()
            # rows that any source of a part lacks are invalid in the part as a whole
            reason = self._reasons[number].get(there)
            if reason is None:
                valid.append(row)
            else:
                shard.mark_invalid(row, reason)
        views = len(manifest.views)
        for column, spec in manifest.source_columns(source).items():
            step = max(1, _AT_ONCE // (spec.row_bytes * views))
            for start in range(0, len(valid), step):
                rows = valid[start : start + step]
                for row, values in zip(rows, self._read(rows, column, manifest), strict=True):
                    shard.write(row, column, values)

    def _read(self, rows: Sequence[int], column: str, manifest: Manifest) -> NDArray[Any]:
        """Read rows of the whole ``[B, V, *shape]``, each from its part."""
        spec = manifest.columns[column]
        out = np.empty((len(rows), len(manifest.views), *spec.shape), dtype=spec.numpy_dtype)
        origin = self._origin[rows]
        for number, reader in enumerate(self._readers):
            here = np.flatnonzero(origin[:, 0] == number)
            if not len(here):
                continue
            values = np.empty((len(here), *spec.shape), dtype=spec.numpy_dtype)
            for view in range(len(manifest.views)):
                reader.read_rows(
                    origin[here, 1],
                    [column],
                    {column: values},
                    views=np.full(len(here), view, dtype=np.int64),
                    pool=self._pool,
                    parts=COPY_THREADS,
                )
                out[here, view] = values
        return out
