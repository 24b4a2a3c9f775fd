"""Shard files that are objects of a bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .bucket import RemotePath

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .bucket import Bucket


class RemoteFiles:
    """Shard files in a bucket. Every read is a request for a range.

    Args:
        bucket: the cache's prefix.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def open(self, paths: Sequence[str]) -> list[str]:
        """Return the objects' names within the prefix."""
        return [path.removeprefix(f"{self._bucket.url}/") for path in paths]

    def read_ready(
        self,
        handles: Sequence[str],
        offsets: Sequence[int],
        chunks: Sequence[memoryview],
        checksum: bytearray,
    ) -> Iterator[int]:
        """Read none of them, as every request waits for its answer."""
        return iter(())

    def read(self, handle: str, offset: int, chunk: memoryview, checksum: bytearray) -> bool:
        """Read a chunk and the checksum after it. It is False when the object ends before."""
        total = len(chunk) + len(checksum)
        if offset + total > RemotePath(self._bucket, handle).file_bytes():
            return False
        data = memoryview(self._bucket.read_range(handle, offset, total))
        if len(data) != total:
            return False
        chunk[:], checksum[:] = data[: len(chunk)], data[len(chunk) :]
        return True

    def tail(self, handle: str, size: int) -> tuple[bytes, int]:
        """Read the last bytes of an object, at most ``size`` of them, and return its length too."""
        length = RemotePath(self._bucket, handle).file_bytes()
        size = min(size, length)
        return bytes(self._bucket.read_range(handle, length - size, size)) if size else b"", length

    def close(self) -> None:
        """Do nothing, as nothing is open."""

    def after_fork(self) -> None:
        """Do nothing, as the bucket refuses by itself."""
