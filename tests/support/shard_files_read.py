"""The index of a shard file, for tests that look inside one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from repa.data.format.shard_index import decode_index, index_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def read_index(descriptor: int, path: str, rows: int, views: int) -> NDArray[np.uint64]:
    """The index ``uint64 [rows, V, 2]`` of an open shard file."""
    file_bytes = os.fstat(descriptor).st_size
    size = index_bytes(rows, views)
    tail = os.pread(descriptor, size, max(file_bytes - size, 0))
    return decode_index(tail, file_bytes, path, rows, views)
