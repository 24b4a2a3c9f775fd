"""An object of a bucket as a file that is read from its beginning on, its next pieces on their way."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .bucket import Bucket, RemotePath
from .files import os_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 4 << 20  # bytes of a request
AHEAD = 4  # pieces on their way
LITTLE = 8 << 10  # bytes of a request where most of the object is passed over


class Objects(Bucket):
    """A prefix whose objects are read in places, as long as they are what they were."""

    def tag_of(self, name: str) -> str | None:
        """Return what tells an object from any that takes its name later.

        It is None of a store that has no such thing.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be told.
        """
        import obstore

        with self.requests(name) as store:
            tag: str | None = obstore.head(store, name)["e_tag"]
            return tag

    def read_same(self, name: str, start: int, length: int, tag: str | None) -> bytes | None:
        """Read some bytes of an object, fewer where it ends before.

        It is None where the object is not that of the tag any more.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """
        import obstore
        from obstore.exceptions import PreconditionError

        with self.requests(name) as store:
            try:
                found = obstore.get(store, name, options={"range": (start, start + length), "if_match": tag})
                return bytes(found.bytes())
            except PreconditionError:
                return None


class ObjectFile:
    """As much of a file as reading a tar needs.

    Args:
        folder: where the object lies.
        name: its name there.
        requests: the threads that ask for it.
        little: ask for a few kilobytes at a time, and for none before they are needed.

    Attributes:
        size: its length in bytes.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be reached.
    """

    def __init__(self, folder: Bucket, name: str, requests: Executor, *, little: bool = False) -> None:
        self.size = folder.size_of(name)
        self._folder, self._name = folder, name
        self._requests = requests
        self._bytes, self._ahead = (LITTLE, 0) if little else (PIECE, AHEAD)
        self._at = 0
        self._asked: dict[int, Future[Any]] = {}

    def read(self, size: int) -> bytes:
        """Read the next bytes, fewer at the end.

        Raises:
            OSError: they cannot be read.
        """
        stop = min(self._at + size, self.size)
        pieces = []
        while self._at < stop:
            number, first = divmod(self._at, self._bytes)
            piece = memoryview(self._piece(number))[first : first + stop - self._at]
            if not piece:
                break  # it has become shorter
            pieces.append(piece)
            self._at += len(piece)
        return b"".join(pieces)

    def seek(self, offset: int) -> None:
        """Go on from another offset. What lies between is not asked for, except what is on its way."""
        self._at = offset

    def _piece(self, number: int) -> Any:
        for passed in [each for each in self._asked if not number <= each <= number + self._ahead]:
            self._asked.pop(passed).cancel()
        for each in range(number, min(number + self._ahead, -(-self.size // self._bytes) - 1) + 1):
            if each not in self._asked:
                start = each * self._bytes
                length = min(self._bytes, self.size - start)
                self._asked[each] = self._requests.submit(self._folder.read_range, self._name, start, length)
        return self._asked[number].result()


@contextmanager
def open_object(url: str, *, little: bool = False) -> Iterator[ObjectFile]:
    """Open the object at an address in a bucket.

    Args:
        url: its address.
        little: most of it will be passed over; see `ObjectFile`.

    Raises:
        RepaError: there is none, it cannot be read, or the package obstore is not installed.
    """
    prefix, _, name = url.rpartition("/")
    folder = Bucket(prefix)
    with os_errors("read", RemotePath(folder, name)), ThreadPoolExecutor(AHEAD + 1) as requests:
        try:
            yield ObjectFile(folder, name, requests, little=little)
        finally:
            requests.shutdown(wait=False, cancel_futures=True)
