"""The index at the end of a shard file, in Zarr v3's public sharding layout.

A shard file is its inner chunks, in any order, followed by the index: for each inner chunk in C order a pair
of uint64 (offset, nbytes), little endian, and a crc32c of those pairs; a missing chunk is (2⁶⁴−1, 2⁶⁴−1).
Source: Zarr v3 specification, "sharding_indexed" codec, version 1.0, with ``index_location: end`` and index
codecs bytes + crc32c. Here an inner chunk is one row and view: ``[rows, V]`` pairs, each chunk its raw bytes
(or what a compressor made of them) followed by their own crc32c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from crc32c import crc32c

from ..errors import CacheError
from ..storage.local import CHECKSUM_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

MISSING = np.uint64(2**64 - 1)


def index_bytes(rows: int, views: int) -> int:
    """Size in bytes of the index of a shard of ``rows`` rows and ``views`` views."""
    return 16 * rows * views + CHECKSUM_BYTES


def encode_index(index: NDArray[np.uint64]) -> bytes:
    """Encode an index ``uint64 [rows, V, 2]`` of (offset, nbytes), with its crc32c."""
    pairs = np.ascontiguousarray(index, dtype="<u8").tobytes()
    return pairs + crc32c(pairs).to_bytes(CHECKSUM_BYTES, "little")


def decode_index(tail: bytes, file_bytes: int, path: str, rows: int, views: int) -> NDArray[np.uint64]:
    """Decode the index ``uint64 [rows, V, 2]`` in the last bytes of a shard file.

    Args:
        tail: the last `index_bytes` of the file, or all there are.
        file_bytes: length of the file.
        path: its name, for the error.
        rows: rows of a shard, those past the last image included.
        views: views of the cache.

    Raises:
        CacheError: the file is too short, or the index does not match its checksum.
    """
    size = index_bytes(rows, views)
    if len(tail) < size:
        raise CacheError(
            f"shard {path} was cut off: {file_bytes} bytes are fewer than its index alone ({size})"
        )
    pairs, stored = tail[:-CHECKSUM_BYTES], int.from_bytes(tail[-CHECKSUM_BYTES:], "little")
    if crc32c(pairs) != stored:
        raise CacheError(f"the index of shard {path} does not match its checksum: the file is damaged")
    return np.frombuffer(pairs, dtype="<u8").astype(np.uint64).reshape(rows, views, 2)
