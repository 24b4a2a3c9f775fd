"""Locks that are objects of a bucket, which nobody unlocks when their holder is killed.

So a holder shows that it lives: it writes its object again every few seconds, and who finds one that has not
been written for longer takes its holder for dead. A dead process of this very machine is seen at once.
No two write one object over each other, as every write names the object it replaces (a conditional put:
``If-None-Match`` and ``If-Match`` of S3, generations of Google's store).
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CacheError
from .folder import ChangedError, TakenError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .bucket import Bucket

LEASE_SECONDS = 60.0
"""How long a holder that does not show that it lives is waited for."""

WRITERS_FOLDER = ".writers"

_RENEW_SECONDS = 15.0
_FREE = b""
_SHORTEST_WAIT, _LONGEST_WAIT = 0.05, 1.0
# of two that ask at once both may see the other, and let go
_TRIES = 3
_APART_SECONDS = (0.1, 0.5)


def put_if(bucket: Bucket, name: str, data: bytes, tag: Mapping[str, str] | None) -> dict[str, str]:
    """Write an object in the place of the one of that tag, or where there is none if it is None.

    Returns:
        The tag of what is there now.

    Raises:
        ChangedError: another is there, with other bytes.
        OSError: the bucket refuses.
    """
    written = bucket.put(name, data, "create" if tag is None else dict(tag))
    if written is not None:
        return written
    # a try whose answer was lost may have written it
    found = bucket.read_tagged(name)
    if found is None or found[0] != data:
        raise ChangedError(f"{bucket.url}/{name}")
    return found[1]


class Lease:
    """An object that this process holds.

    Args:
        bucket: where it lies.
        name: its name.
        note: what others are to know of it.
    """

    def __init__(self, bucket: Bucket, name: str, note: Mapping[str, Any] | None = None) -> None:
        self._bucket = bucket
        self._name = name
        self._values = {"holder": secrets.token_hex(8), "process": this_process(), **(note or {})}
        self._written = 0
        self._tag: Mapping[str, str] | None = None
        self._renewed = 0.0
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="repa-lease", daemon=True)

    def take(self, tag: Mapping[str, str] | None) -> bool:
        """Become the holder where the object is still that of the tag, or there is none if it is None.

        Raises:
            OSError: the bucket refuses.
        """
        try:
            self._put(tag)
        except ChangedError:
            return False
        self._thread.start()
        return True

    def wait(self) -> None:
        """Become the holder as soon as there is no other.

        Raises:
            OSError: the bucket refuses.
        """
        watched: Mapping[str, str] | None = None
        since, pause = time.monotonic(), _SHORTEST_WAIT
        while True:
            found = self._bucket.read_tagged(self._name)
            data, tag = (_FREE, None) if found is None else found
            if tag != watched:
                watched, since = tag, time.monotonic()
            free = data == _FREE or is_gone(data) or time.monotonic() - since > LEASE_SECONDS
            if free and self.take(tag):
                return
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, _LONGEST_WAIT)

    def check(self) -> None:
        """Look whether this process is the holder still.

        Raises:
            CacheError: others may have taken it for dead.
        """
        if self._lost or time.monotonic() - self._renewed > LEASE_SECONDS:
            raise CacheError(
                f"this process has lost {self._bucket.url}/{self._name}, which it could not write for "
                f"{LEASE_SECONDS:.0f} s",
                "run the same command again, which writes what is not committed",
            )

    def lose(self) -> None:
        """Know that others have taken this process for dead."""
        self._lost = True

    def release(self, *, keep: bool) -> None:
        """Let go of the object. What cannot be told to the bucket now, it sees when nobody renews it.

        Args:
            keep: leave it there, empty.
        """
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lost or time.monotonic() - self._renewed > LEASE_SECONDS / 2:
            return  # it may be another's by now
        with suppress(OSError, ChangedError):
            if keep:
                put_if(self._bucket, self._name, _FREE, self._tag)
            else:
                self._bucket.delete([self._name])

    def _put(self, tag: Mapping[str, str] | None) -> None:
        self._written += 1
        data = json.dumps({**self._values, "written": self._written}).encode()
        asked = time.monotonic()
        self._tag = put_if(self._bucket, self._name, data, tag)
        self._renewed = asked

    def _renew(self) -> None:
        while not self._ended.wait(_RENEW_SECONDS):
            try:
                self._put(self._tag)
            except ChangedError:
                self._lost = True
                return
            except OSError:
                continue  # `check` tells when it has been too long


@contextmanager
def leased(bucket: Bucket, name: str, *, keep: bool) -> Iterator[Lease]:
    """Hold an object, after waiting for other holders.

    Args:
        bucket: where it lies.
        name: its name.
        keep: leave it there afterwards, empty.

    Raises:
        OSError: the bucket refuses.
    """
    lease = Lease(bucket, name)
    lease.wait()
    try:
        yield lease
    finally:
        lease.release(keep=keep)


class NumbersLease:
    """Numbers of a folder of a bucket that this process holds, all or none of them.

    Each holder has an object of its own, which says its numbers. It is written first and those of others are
    looked at afterwards, so of two that want the same number one at least sees the other.

    Args:
        bucket: where it lies.
        folder: its name.
        numbers: to hold.

    Raises:
        TakenError: another holds one.
        OSError: the bucket refuses.
    """

    def __init__(self, bucket: Bucket, folder: str, numbers: Sequence[int]) -> None:
        self._bucket = bucket
        self._folder = f"{folder}/{WRITERS_FOLDER}"
        taken: int | None = None
        for _ in range(_TRIES):
            name = f"{self._folder}/{secrets.token_hex(8)}"
            self._lease = Lease(bucket, name, {"numbers": list(numbers)})
            if self._lease.take(None):
                try:
                    taken = self._find_taken(name, frozenset(numbers))
                except BaseException:
                    self.release()
                    raise
                if taken is None:
                    return
                self.release()
            time.sleep(random.uniform(*_APART_SECONDS))
        raise TakenError(taken)

    def check(self) -> None:
        """Look whether they are held still, see `Lease.check`."""
        self._lease.check()

    def release(self) -> None:
        """Let go of all of them."""
        self._lease.release(keep=False)

    def _find_taken(self, own: str, numbers: frozenset[int]) -> int | None:
        """Return a number that another holds, or None. Objects of dead holders are removed."""
        objects = {each["path"]: each for each in self._bucket.children(self._folder)[1]}
        if own not in objects:
            self._lease.lose()
            self._lease.check()
        # by the store's own clock
        self._began = objects.pop(own)["last_modified"]
        for name, each in objects.items():
            found = self._bucket.read_tagged(name)
            if found is None:
                continue
            if found[0] == _FREE or self._is_dead(each, found[0]):
                # one that has just been renewed is of somebody who lives
                with suppress(ChangedError):
                    put_if(self._bucket, name, _FREE, found[1])
                    self._bucket.delete([name])
                    continue
            # what cannot be read is of a later version, which may hold anything
            held = numbers.intersection(_values(found[0]).get("numbers", numbers))
            if held:
                return min(held)
        return None

    def sweep(self, folder: str, lock: str) -> None:
        """Free a lock, and remove those of its parts, as far as their holders were killed.

        Args:
            folder: where they lie.
            lock: name of the lock in the bucket; its parts begin with it and a dot.

        Raises:
            OSError: the bucket refuses.
        """
        for each in self._bucket.children(folder)[1]:
            name = each["path"]
            if name != lock and not name.startswith(f"{lock}."):
                continue
            found = self._bucket.read_tagged(name)
            if found is None or found[0] == _FREE or not self._is_dead(each, found[0]):
                continue
            with suppress(ChangedError):
                put_if(self._bucket, name, _FREE, found[1])
                if name != lock:
                    self._bucket.delete([name])

    def _is_dead(self, described: Mapping[str, Any], lease: bytes) -> bool:
        age = (self._began - described["last_modified"]).total_seconds()
        return age > LEASE_SECONDS or is_gone(lease)


def is_lease(name: str) -> bool:
    """Tell by its name within a cache whether an object is a lease, which may be there while others write."""
    return f"/{WRITERS_FOLDER}/" in name or re.fullmatch(r"\.lock\.\d+", name) is not None


def this_process() -> dict[str, Any] | None:
    """Return what tells this process from all others of all machines, or None where Linux does not say."""
    machine = _machine()
    start = _start_of(os.getpid())
    return None if machine is None or start is None else {**machine, "pid": os.getpid(), "start": start}


def is_gone(lease: bytes) -> bool:
    """Tell whether the holder of a lease was a process of this machine that has ended."""
    process = _values(lease).get("process")
    machine = _machine()
    if not isinstance(process, dict) or machine is None:
        return False
    if any(process.get(key) != value for key, value in machine.items()):
        return False
    pid = process.get("pid")
    return isinstance(pid, int) and _start_of(pid) != process.get("start")


def _values(lease: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        found = json.loads(lease)
        if isinstance(found, dict):
            return found
    return {}


def _machine() -> dict[str, str] | None:
    """Return what tells the process ids seen here from those of other machines and containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return None


def _start_of(pid: int) -> int | None:
    """Return when a living process began, in ticks since the machine did, or None where there is none."""
    try:
        # the name of the program, in brackets, may hold anything
        state, *fields = Path(f"/proc/{pid:d}/stat").read_bytes().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in (b"Z", b"X") else int(fields[18])
