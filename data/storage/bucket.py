"""Caches in a bucket, ``s3://bucket/path`` or ``gs://bucket/path``.

A cache lies there as it lies in a folder, file by file. `RemotePath` has as much of `pathlib.Path` as reading
a cache needs, so the same code reads manifest, records and labels of both; rows are ranges of objects.
Writing is `bucket_folder`'s.
The objects are reached by the package ``obstore`` (the Rust crate object_store), which takes credentials,
region and endpoint from the usual environment variables: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS`` and so on.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ..errors import CacheError
from .object_store import errors_of_the_system, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence


E = TypeVar("E")
T = TypeVar("T")

# a request takes tens of milliseconds, most of them waiting
REQUESTS = 32

_URL = re.compile(r"(?:s3|gs)://[^/]+(?:/.*)?")
# what is meant as an address, whose slashes a path may have lost; a folder of such a name is ./NAME:/…
_MEANT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/.*")
# of a range whose answer breaks off, which the package does not ask for again; and how it says so
_ANSWERS = 3
_BROKEN_OFF = ("request or response body error", "Requested ")


class Bucket:
    """A prefix of a bucket, and what lies there. Threads share it, and it may be pickled.

    Args:
        url: of the prefix.

    Raises:
        RepaError: the package obstore is not installed, the address is none, or an environment variable that
            leads there is malformed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._sizes: dict[str, int] | None = None
        self._store = open_store(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bucket, (self.url,)

    @contextmanager
    def requests(self, name: str) -> Iterator[Any]:
        """Lend the store. What goes wrong with it becomes an error of the operating system, as of a file."""
        if self._process != os.getpid():
            # its threads were not forked with it: a request would wait for ever
            raise CacheError(
                f"{self.url} was opened before this process was forked",
                "open it afterwards, or start processes by spawn",
            )
        with errors_of_the_system(self.url, name):
            yield self._store

    def read(self, name: str) -> bytes:
        """Read the bytes of an object.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """
        import obstore

        with self.requests(name) as store:
            return bytes(obstore.get(store, name).bytes())

    def read_tagged(self, name: str) -> tuple[bytes, dict[str, str]] | None:
        """Read the bytes of an object and what tells it from any other, or None where there is none.

        Raises:
            OSError: it cannot be read.
        """
        import obstore

        try:
            with self.requests(name) as store:
                found = obstore.get(store, name)
                tag = tag_of(found.meta)  # earlier versions of the package forget it with the bytes
                return bytes(found.bytes()), tag
        except FileNotFoundError:
            return None

    def read_range(self, name: str, start: int, length: int) -> Any:
        """Read some bytes of an object into a buffer. They are fewer where it ends before.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """
        import obstore
        from obstore.exceptions import GenericError

        with self.requests(name) as store:
            for left in reversed(range(_ANSWERS)):
                try:
                    return obstore.get_range(store, name, start=start, length=length)
                except GenericError as error:
                    if not left or not any(words in str(error) for words in _BROKEN_OFF):
                        raise

    def size_of(self, name: str) -> int:
        """Ask for the size of an object by itself.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be told.
        """
        import obstore

        with self.requests(name) as store:
            size: int = obstore.head(store, name)["size"]
            return size

    def describe(self, name: str) -> Mapping[str, Any] | None:
        """Ask for what the store knows of an object, its ``e_tag`` among it, or None where there is none.

        Raises:
            OSError: it cannot be told.
        """
        import obstore

        try:
            with self.requests(name) as store:
                found: Mapping[str, Any] = obstore.head(store, name)
                return found
        except FileNotFoundError:
            return None

    def children(self, name: str) -> tuple[list[str], list[Mapping[str, Any]]]:
        """List what lies directly under a name, as names of folders and as descriptions of objects.

        Raises:
            OSError: the bucket cannot be listed.
        """
        import obstore

        with self.requests(name) as store:
            found = obstore.list_with_delimiter(store, name or None)
            return list(found["common_prefixes"]), list(found["objects"])

    def below(self, name: str) -> list[str]:
        """List the names of all objects under a name, however deep.

        Raises:
            OSError: the bucket cannot be listed.
        """
        import obstore

        with self.requests(name) as store:
            return [item["path"] for page in obstore.list(store, name, chunk_size=1000) for item in page]

    def put(self, name: str, data: bytes, mode: Any = "overwrite") -> dict[str, str] | None:
        """Write an object whole, at once.

        Args:
            name: of the object.
            data: all of its bytes.
            mode: ``overwrite``; ``create``, where there is none; or the tag of the one that is to go.

        Returns:
            What tells it from any that takes its name later; None where it was not written, as the mode
            forbids it.

        Raises:
            OSError: it cannot be written.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self.requests(name) as store:
            try:
                found = obstore.put(store, name, data, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return None
            except FileNotFoundError:
                if mode in ("overwrite", "create"):
                    raise
                return None  # the one that was to go has gone
        self.note(name, len(data))
        return tag_of(found)

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects, as far as they are there.

        Raises:
            OSError: one cannot be removed.
        """
        import obstore

        for name in names:
            with suppress(FileNotFoundError), self.requests(name) as store:
                obstore.delete(store, name)
            self.note(name, None)

    def look_again(self) -> None:
        """Forget the listing, as others may have written since."""
        with self._lock:
            self._sizes = None

    def note(self, name: str, size: int | None) -> None:
        """Keep the listing in step with what this process has written, or removed where the size is None."""
        with self._lock:
            if self._sizes is not None:
                self._sizes.pop(name, None)
                if size is not None:
                    self._sizes[name] = size

    def sizes(self) -> dict[str, int]:
        """Name → size of every object under the prefix, listed once.

        Raises:
            OSError: the bucket cannot be listed.
        """
        import obstore

        # outside the lock: a forked process is refused before it could wait for it
        with self.requests("") as store, self._lock:
            if self._sizes is None:
                pages = obstore.list(store, chunk_size=1000)
                self._sizes = {item["path"]: item["size"] for page in pages for item in page}
            return self._sizes


class RemotePath:
    """The name of an object under a prefix.

    Args:
        bucket: the prefix.
        name: the name within it, its parts joined by ``/``; empty for the prefix itself.
    """

    def __init__(self, bucket: Bucket, name: str = "") -> None:
        self.bucket = bucket
        self.name_in_bucket = name

    def __str__(self) -> str:
        return f"{self.bucket.url}/{self.name_in_bucket}".rstrip("/")

    def __fspath__(self) -> str:
        return str(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> RemotePath:
        return self.joinpath(name)

    def joinpath(self, *names: str) -> RemotePath:
        """Return a name below this one."""
        parts = (*([self.name_in_bucket] if self.name_in_bucket else []), *names)
        return RemotePath(self.bucket, "/".join(parts))

    @property
    def name(self) -> str:
        """The last part of the name."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The name without its last part. The prefix itself has itself."""
        return RemotePath(self.bucket, self.name_in_bucket.rpartition("/")[0])

    def exists(self) -> bool:
        """Tell whether there is an object of the name.

        Raises:
            OSError: it cannot be told.
        """
        return self.bucket.describe(self.name_in_bucket) is not None

    def read_bytes(self) -> bytes:
        """Read the object's bytes.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """
        return self.bucket.read(self.name_in_bucket)

    def file_bytes(self) -> int:
        """Return the object's size by the listing.

        Raises:
            FileNotFoundError: there is none.
            OSError: the bucket cannot be listed.
        """
        try:
            return self.bucket.sizes()[self.name_in_bucket]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from None


CachePath: TypeAlias = Path | RemotePath


def is_remote(given: str | os.PathLike[str]) -> bool:
    """Tell by its address whether a path is a bucket's."""
    return _URL.fullmatch(os.fspath(given)) is not None


def cache_path(given: str | CachePath) -> CachePath:
    """Turn what the user gave into a cache's folder or prefix.

    Raises:
        RepaError: the package that reaches buckets is not installed, or the address is none.
    """
    if isinstance(given, RemotePath):
        return given
    if is_remote(given):
        return RemotePath(Bucket(str(given)))
    # otherwise a slip of the pen would write a large cache to a folder of that name
    if _MEANT.fullmatch(str(given)) and not Path(given).exists():
        raise CacheError(
            f"{given} is no address of a bucket",
            "write it as s3://bucket/path or gs://bucket/path",
            field="--cache",
        )
    return Path(given)


def file_bytes(path: CachePath) -> int:
    """Return the size of a file or object.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be told.
    """
    return path.file_bytes() if isinstance(path, RemotePath) else path.stat().st_size


def look_again(path: CachePath) -> None:
    """Forget what a bucket was seen to hold. A folder is looked at every time."""
    if isinstance(path, RemotePath):
        path.bucket.look_again()


def tag_of(found: Mapping[str, Any]) -> dict[str, str]:
    """Return what tells an object from any that takes its name later."""
    return {key: found[key] for key in ("e_tag", "version") if found.get(key) is not None}


def map_files(action: Callable[[E], T], numbers: Iterable[E], path: CachePath) -> list[T]:
    """Apply an action of a file to each number. Many run at once where it is a request."""
    if isinstance(path, Path):
        return [action(number) for number in numbers]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(action, numbers))
