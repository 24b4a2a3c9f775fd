"""A prefix of a bucket that is written to.

A large object grows by parts of a multipart upload, which nobody sees before it is completed; the store keeps
the parts of one that is never completed until it is aborted, or a lifecycle rule of the bucket does so.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..errors import CacheError
from .folder import LOCK_NAME, ChangedError, Seen
from .leases import NumbersLease, leased, put_if

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .bucket import RemotePath
    from .folder import Held

PART_BYTES = 8 << 20
"""Of an upload, at least; so much of each column that is being written is held in memory."""

PARTS_ON_THEIR_WAY = 4
"""Of a column, held in memory too."""

_PROBE = ".probe-"  # how names of objects begin that are there to see what the store allows

_MOST_PARTS = 8000  # of the 10,000 that S3 takes, as a compressed file may become larger than thought


class BucketFolder:
    """A prefix of a bucket, see `folder.Folder`.

    Args:
        root: its path.
    """

    def __init__(self, root: RemotePath) -> None:
        self._root = root
        self._bucket = root.bucket

    def exists(self, path: RemotePath) -> bool:
        """Tell whether there is an object."""
        return path.exists()

    def names(self, path: RemotePath) -> list[str]:
        """List what lies directly under a name, ascending, without what `probe` puts there.

        A process that begins beside this one may be at it, and one that was killed leaves it.
        """
        folders, objects = self._bucket.children(path.name_in_bucket)
        found = (name.rpartition("/")[2] for name in (*folders, *(each["path"] for each in objects)))
        return sorted(name for name in found if not name.startswith(_PROBE))

    def put(self, path: RemotePath, data: bytes) -> None:
        """Write a small object."""
        self._bucket.put(path.name_in_bucket, data)

    def seen(self, path: RemotePath) -> Seen:
        """Look at an object, for `put_if`."""
        from .bucket import tag_of

        found = self._bucket.describe(path.name_in_bucket)
        return Seen(None if found is None else tag_of(found))

    def look(self, path: RemotePath) -> tuple[bytes | None, Seen]:
        """Read a small object, None where there is none."""
        found = self._bucket.read_tagged(path.name_in_bucket)
        return (None, Seen(None)) if found is None else (found[0], Seen(found[1]))

    def put_if(self, path: RemotePath, data: bytes, seen: Seen) -> Seen:
        """Write a small object in the place of what was seen there."""
        return Seen(put_if(self._bucket, path.name_in_bucket, data, seen.tag))

    def withdraw(self, path: RemotePath, seen: Seen) -> Seen:
        """Leave no bytes of an object, if it was there."""
        return seen if seen.tag is None else self.put_if(path, b"", seen)

    def require_inside(self, paths: Iterable[RemotePath]) -> None:
        """Do nothing, as there are no links."""

    def remove(self, paths: Iterable[RemotePath]) -> None:
        """Remove objects, as far as they are there."""
        self._bucket.delete([path.name_in_bucket for path in paths])

    def remove_all(self, path: RemotePath, held: Held) -> None:
        """Remove all objects below a name."""
        from .bucket import map_files

        def remove(name: str) -> None:
            # after all was listed: what has been written since is another's
            held.check()
            self._bucket.delete([name])

        map_files(remove, self._bucket.below(path.name_in_bucket), path)

    def remove_if_empty(self, path: RemotePath) -> None:
        """Do nothing, as there are no folders."""

    def settle(self) -> None:
        """Do nothing, as what is written is there."""

    def begin(self, path: RemotePath, most_bytes: int) -> _Upload:
        """Begin a multipart upload."""
        return _Upload(path, most_bytes)

    @contextmanager
    def locked(self, path: RemotePath, part: int | None = None) -> Iterator[Held]:
        """Hold a lock object, or one of the part that is gone afterwards."""
        name = path.name_in_bucket if part is None else f"{path.name_in_bucket}.{part:d}"
        with leased(self._bucket, name, keep=part is None) as lease:
            yield lease

    def claim(self, path: RemotePath, numbers: Sequence[int]) -> NumbersLease:
        """Hold numbers of a folder."""
        claim = NumbersLease(self._bucket, path.name_in_bucket, numbers)
        try:
            claim.sweep(self._root.name_in_bucket, (self._root / LOCK_NAME).name_in_bucket)
        except BaseException:
            claim.release()
            raise
        return claim

    def probe(self) -> None:
        """Write a small object and remove it again, to see what the store allows.

        Raises:
            CacheError: the store writes one object over another where it was told not to.
            OSError: it refuses.
        """
        name = f"{_PROBE}{secrets.token_hex(8)}"
        put_if(self._bucket, name, b"1", None)
        try:
            with suppress(ChangedError):
                put_if(self._bucket, name, b"2", None)
                raise CacheError(
                    f"the store of {self._root} takes no heed of If-None-Match, which keeps the writers of a "
                    "cache apart",
                    "write the cache to a folder and copy it there, or update the store",
                    field="--cache",
                )
        finally:
            self._bucket.delete([name])


class _Upload:
    """An object in the making. Its parts go out while others are appended."""

    def __init__(self, path: RemotePath, most_bytes: int) -> None:
        self._path = path
        self._length = 0
        self._part_bytes = max(PART_BYTES, -(-most_bytes // _MOST_PARTS))
        self._writer: Any = None
        self._done = False

    def append(self, pieces: Sequence[memoryview | bytes]) -> None:
        if self._done:
            raise ValueError(f"{self._path} has been finished, or a write to it has failed")
        total = sum(map(len, pieces))
        try:
            with self._path.bucket.requests(self._path.name_in_bucket) as store:
                if self._writer is None:
                    self._writer = self._open(store)
                # a copy, as the package keeps what it is given until it is sent, and the caller may reuse it
                self._writer.write(b"".join(pieces))
        except BaseException:
            self.abandon()
            raise
        self._length += total

    def finish(self) -> None:
        """Let the parts go out. That all have arrived is known when they are published."""
        if self._done:
            raise ValueError(f"{self._path} has been finished, or a write to it has failed")

    def publish(self) -> None:
        name = self._path.name_in_bucket
        try:
            with self._path.bucket.requests(name) as store:
                if self._writer is None:
                    self._writer = self._open(store)
                self._writer.close()
        except BaseException:
            self.abandon()
            raise
        self._done = True
        self._path.bucket.note(name, self._length)

    def abandon(self) -> None:
        # what cannot be aborted now is left to a lifecycle rule of the bucket
        if self._writer is not None and not self._done:
            with suppress(OSError), self._path.bucket.requests(self._path.name_in_bucket):
                self._writer.__exit__(InterruptedError, InterruptedError(), None)
        self._done = True

    def _open(self, store: Any) -> Any:
        import obstore

        return obstore.open_writer(
            store,
            self._path.name_in_bucket,
            buffer_size=self._part_bytes,
            max_concurrency=PARTS_ON_THEIR_WAY,
        )
