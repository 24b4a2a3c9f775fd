"""Rows of a cache read in all views, for what is told of a cache as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from .reader import CacheReader


def read_all_views(
    reader: CacheReader, rows: NDArray[np.int64], columns: Sequence[str], *, pool: Executor | None = None
) -> dict[str, NDArray[Any]]:
    """Read rows in all views.

    Args:
        reader: of the columns.
        rows: rows of the cache, int64 ``[B]``.
        columns: columns to read.
        pool: runs the parts; the calling thread does without it.

    Returns:
        Column → ``[B, V, *shape]`` of the stored dtype.

    Raises:
        CacheError: see `CacheReader.read_rows`.
    """
    count = len(reader.manifest.views)
    repeated = np.repeat(rows, count)
    views = np.tile(np.arange(count, dtype=np.int64), len(rows))
    out = {}
    for name in columns:
        spec = reader.manifest.columns[name]
        array = np.empty((len(repeated), *spec.shape), dtype=spec.numpy_dtype)
        reader.read_rows(
            repeated, (name,), {name: array}, views=views, pool=pool, parts=reader.threads_for(1)
        )
        out[name] = array.reshape(len(rows), count, *spec.shape)
    return out
