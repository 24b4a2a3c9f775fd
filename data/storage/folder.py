"""How a cache is written, wherever its bytes lie.

What stands under a name is whole, whoever looks and whenever the writer is killed. Small files are put there
at once; large ones grow where nobody sees them and are then published. `local_folder.LocalFolder` is a folder
of a disk, `bucket_folder.BucketFolder` a prefix of a bucket; `writable.open_writable` tells them apart, and
who writes a cache does not.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager


LOCK_NAME = ".lock"


class ChangedError(Exception):
    """A file that is not what was seen under its name before."""


@contextmanager
def unless_changed(path: Any) -> Iterator[None]:
    """Turn a file that is not what was seen into one line.

    Raises:
        CacheError: in place of `ChangedError`.
    """
    try:
        yield
    except ChangedError as error:
        raise CacheError(
            f"another process has written {path} meanwhile", "run the same command again"
        ) from error


class TakenError(Exception):
    """Numbers that another holds.

    Args:
        number: one of them; None where this process holds some of the same folder.
    """

    def __init__(self, number: int | None) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Seen:
    """What was seen under a name, to be written over only as long as it is that.

    Attributes:
        tag: what tells it from any that takes its name later; None: nothing was there.
    """

    tag: Mapping[str, str] | None


class Held(Protocol):
    """A lock or some numbers that are held."""

    def check(self) -> None:
        """Look whether it is held still, before what must be done by its holder alone.

        Raises:
            CacheError: it has been lost, as its holder was taken for dead.
        """
        ...


class Claim(Held, Protocol):
    """Numbers that are held until they are let go, or the process ends."""

    def release(self) -> None:
        """Let go of all of them."""
        ...


class FileInMaking(Protocol):
    """A file that nobody sees until it is published."""

    def append(self, pieces: Sequence[memoryview | bytes]) -> None:
        """Write bytes at its end. After an error it can only be abandoned.

        Raises:
            OSError: the storage refuses.
            ValueError: it has been finished, or a write to it has failed.
        """
        ...

    def finish(self) -> None:
        """Say that all of it has been appended, and have that survive a power cut.

        Raises:
            OSError: the storage refuses.
        """
        ...

    def publish(self) -> None:
        """Give it its name, in the place of what was there.

        Raises:
            OSError: the storage refuses.
        """
        ...

    def abandon(self) -> None:
        """Leave nothing behind, unless it has been published."""
        ...


class Folder(Protocol):
    """A folder that is written to. Paths that it is asked about are of its kind and below its root."""

    def exists(self, path: Any) -> bool:
        """Tell whether there is a file.

        Raises:
            OSError: it cannot be told.
        """
        ...

    def names(self, path: Any) -> list[str]:
        """List what lies directly in a folder, ascending. Where there is no such folder that is nothing.

        Raises:
            OSError: it cannot be listed.
        """
        ...

    def put(self, path: Any, data: bytes) -> None:
        """Write a small file whole or not at all, in the place of what is there.

        Raises:
            OSError: the storage refuses.
        """
        ...

    def seen(self, path: Any) -> Seen:
        """Look at a file, for `put_if`.

        Raises:
            OSError: it cannot be told.
        """
        ...

    def look(self, path: Any) -> tuple[bytes | None, Seen]:
        """Read a small file, None where there is none, for `put_if`.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def put_if(self, path: Any, data: bytes, seen: Seen) -> Seen:
        """Write a small file in the place of what was seen there.

        On a disk it is the caller's lock that keeps others from writing it meanwhile; a bucket looks itself.

        Returns:
            What is there now.

        Raises:
            ChangedError: something else is there, and stays.
            OSError: the storage refuses.
        """
        ...

    def withdraw(self, path: Any, seen: Seen) -> Seen:
        """Take back a file that was seen there, so that what it stands for may change.

        Afterwards there is none; in a bucket, where nothing can be removed on a condition, one without bytes.

        Returns:
            What is there now.

        Raises:
            ChangedError: something else is there, and stays.
            OSError: the storage refuses.
        """
        ...

    def require_inside(self, paths: Iterable[Any]) -> None:
        """Require files to lie in the folder itself, so that `remove` will not refuse one of them halfway.

        Raises:
            OSError: one lies behind a link.
        """
        ...

    def remove(self, paths: Iterable[Any]) -> None:
        """Remove files, as far as they are there.

        Raises:
            OSError: the storage refuses.
        """
        ...

    def remove_all(self, path: Any, held: Held) -> None:
        """Remove a folder and all that is in it, if it is there. A link stays.

        Args:
            path: of the folder.
            held: under which nobody else writes there.

        Raises:
            CacheError: it has been lost.
            OSError: the storage refuses.
        """
        ...

    def remove_if_empty(self, path: Any) -> None:
        """Remove a folder that nothing is in."""
        ...

    def settle(self) -> None:
        """Have the root's own name survive a power cut.

        Raises:
            OSError: the storage refuses.
        """
        ...

    def begin(self, path: Any, most_bytes: int) -> FileInMaking:
        """Begin a large file, of about so many bytes at most.

        Raises:
            OSError: the storage refuses.
        """
        ...

    def locked(self, path: Any, part: int | None = None) -> AbstractContextManager[Held]:
        """Hold a lock, after waiting for other processes and threads. An empty file stays under its name.

        Args:
            path: of the lock file.
            part: hold no more than this part of what the lock is for, where the storage can.

        Raises:
            OSError: the storage refuses.
        """
        ...

    def claim(self, path: Any, numbers: Sequence[int]) -> Claim:
        """Hold numbers of a folder, all or none of them, without waiting.

        Raises:
            TakenError: another holds one.
            OSError: the storage refuses.
        """
        ...
