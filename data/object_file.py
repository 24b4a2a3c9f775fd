"""An object of a bucket as a file that is read from its beginning on, its next pieces on their way."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .files import os_errors
from .remote import Bucket, RemotePath

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 4 << 20  # bytes of a request
AHEAD = 4  # pieces on their way


class ObjectFile:
    """As much of a file as reading a tar needs.

    Args:
        folder: where the object lies.
        name: its name there.
        requests: the threads that ask for it.

    Attributes:
        size: its length in bytes.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be reached.
    """

    def __init__(self, folder: Bucket, name: str, requests: Executor) -> None:
        self.size = folder.size_of(name)
        self._folder, self._name = folder, name
        self._requests = requests
        self._at = 0
        self._asked: dict[int, Future[Any]] = {}

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end.

        Raises:
            OSError: they cannot be read.
        """
        stop = min(self._at + size, self.size)
        parts = []
        while self._at < stop:
            number, first = divmod(self._at, PIECE)
            part = memoryview(self._piece(number))[first : first + stop - self._at]
            if not part:
                break  # it has become shorter
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def seek(self, offset: int) -> None:
        """Go on from another place; what lies between is not asked for, but for what is on its way."""
        self._at = offset

    def _piece(self, number: int) -> Any:
        for passed in [each for each in self._asked if not number <= each <= number + AHEAD]:
            self._asked.pop(passed).cancel()
        for each in range(number, min(number + AHEAD, -(-self.size // PIECE) - 1) + 1):
            if each not in self._asked:
                start = each * PIECE
                length = min(PIECE, self.size - start)
                self._asked[each] = self._requests.submit(self._folder.read_range, self._name, start, length)
        return self._asked[number].result()


@contextmanager
def open_object(url: str) -> Iterator[ObjectFile]:
    """The object at an address in a bucket.

    Raises:
        RepaError: there is none, it cannot be read, or the package obstore is not installed.
    """
    prefix, _, name = url.rpartition("/")
    folder = Bucket(prefix)
    with os_errors("read", RemotePath(folder, name)), ThreadPoolExecutor(AHEAD + 1) as requests:
        try:
            yield ObjectFile(folder, name, requests)
        finally:
            requests.shutdown(wait=False, cancel_futures=True)
