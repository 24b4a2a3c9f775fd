"""How fast a column is read here and now, compressed as it is and as it would be uncompressed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.format.columns import source_of
from ...data.format.opening import labels_sha256
from ...data.reading.reader import CacheReader
from ...data.storage.files import os_errors
from ...data.writing.store import create_cache, ensure_source, keys_sha256
from ...data.writing.writer import SourceWriter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...data.storage.bucket import CachePath

_ROWS = 128
_BYTES = 64_000_000
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class ReadSpeed:
    """Random rows of one column, read by one thread from the page cache, the faster of two passes.

    Attributes:
        rows: rows read in a pass.
        stored: bytes of data a second, out of the cache as it is.
        plain: the same of the same rows written uncompressed to a temporary folder.
    """

    rows: int
    stored: float
    plain: float


def measure_read_speed(path: CachePath, column: str) -> ReadSpeed | None:
    """Read up to 128 random valid rows, at most 64 MB, of a column as it is and uncompressed.

    Args:
        path: folder of the cache.
        column: name of a column whose source is complete.

    Returns:
        The speeds; None when the cache has no valid row.

    Raises:
        CacheError: the column is missing, not completely written or corrupt.
        RepaError: the compressor's package is not installed, or the operating system refuses.
    """
    with CacheReader(path, [column]) as reader:
        spec = reader.manifest.columns[column]
        count = min(_ROWS, max(1, _BYTES // spec.row_bytes), len(reader.valid_rows))
        if not count:
            return None
        rows = np.random.default_rng(_SEED).choice(reader.valid_rows, count, replace=False)
        values = np.zeros((count, *spec.shape), dtype=spec.numpy_dtype)
        stored = _speed(reader, column, rows, values)
    with TemporaryDirectory(prefix="repa-read-speed-") as folder, os_errors("write", Path(folder)):
        plain_path = Path(folder) / "cache"
        _write_plain(reader, plain_path, column, values)
        with CacheReader(plain_path, [column]) as plain:
            order = np.random.default_rng(_SEED).permutation(count)
            return ReadSpeed(rows=count, stored=stored, plain=_speed(plain, column, order, values))


def _speed(reader: CacheReader, column: str, rows: NDArray[np.int64], out: NDArray[Any]) -> float:
    """Measure bytes of data a second."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        reader.read_rows(rows, [column], {column: out})
        seconds.append(time.perf_counter() - started)
    return out.nbytes / min(seconds)


def _write_plain(reader: CacheReader, path: Path, column: str, values: NDArray[Any]) -> None:
    """Write a cache of one column and one view, uncompressed, with these rows ``[n, *shape]``."""
    count, source = len(values), source_of(column)
    keys, labels = [str(row) for row in range(count)], np.zeros(count, dtype=np.int32)
    empty = replace(
        reader.manifest,
        num_rows=count,
        views=reader.manifest.views[:1],
        keys_sha256=keys_sha256(keys),
        labels_sha256=labels_sha256(labels) if reader.manifest.format_version > 1 else "",
        columns={},
        sources={},
    )
    create_cache(path, empty, keys, labels)
    columns = {column: replace(reader.manifest.columns[column], compressor=None)}
    manifest = ensure_source(path, source, reader.manifest.sources[source], columns)
    with SourceWriter(path, manifest, source, range(manifest.num_shards)) as writer:
        for number in writer.remaining:
            with writer.shard(number) as shard:
                for row in shard.rows:
                    shard.write(row, column, values[row : row + 1])
                shard.commit()
