"""Writers of a cache in a bucket that are killed between two requests, and what it is compared with."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from repa.data.storage import leases
from s3_server import objects_of, obstore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest


class Killed(BaseException):
    """The process is gone: nothing it still asks for reaches the bucket."""


class Life:
    """Lets ``steps`` requests that change the bucket happen; the next, and all after it, raise `Killed`.

    Its leases are those of a process of this machine that has ended.
    """

    def __init__(self, patch: pytest.MonkeyPatch, steps: int) -> None:
        self.left = steps
        for name in ("put", "delete"):
            patch.setattr(obstore, name, self.mortal(getattr(obstore, name)))
        opened = obstore.open_writer

        def open_writer(*args: Any, **options: Any) -> Any:
            return _Writer(self, opened(*args, **options))

        patch.setattr(obstore, "open_writer", open_writer)
        here = leases.this_process()
        assert here is not None
        patch.setattr(leases, "this_process", lambda: {**here, "start": here["start"] - 1})

    def mortal(self, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return function(*args, **options)

        return call


class _Writer:
    """An upload of a process that may die, which completes and aborts nothing then."""

    def __init__(self, life: Life, writer: Any) -> None:
        self._writer = writer
        self.write = writer.write
        self.close = life.mortal(writer.close)
        self.__exit = life.mortal(writer.__exit__)

    def __exit__(self, *about: object) -> None:
        self.__exit(*about)


class Sleep:
    """Lets all requests happen; before the first one of a name, another process takes over and ends.

    The sleeper finds its leases a thousand seconds old.

    Args:
        patch: undoes it.
        request: name of the function that asks the bucket.
        ending: of the name of the object or prefix that is asked for.
        another: what is done meanwhile, in a thread of its own.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, request: str, ending: str, another: Callable[[], object]
    ) -> None:
        self.slept = False
        self._ending, self._another = ending, another
        self._leases: list[Any] = []
        patch.setattr(obstore, request, self._sleepy(getattr(obstore, request)))
        here, awake = leases.this_process(), leases.Lease.__init__
        assert here is not None

        def begin(lease: Any, *about: Any) -> None:
            awake(lease, *about)
            if threading.current_thread() is threading.main_thread():
                self._leases.append(lease)

        patch.setattr(leases.Lease, "__init__", begin)
        patch.setattr(
            leases,
            "this_process",
            lambda: here if self.slept else {**here, "start": here["start"] - 1},
        )

    def _sleepy(self, function: Any) -> Any:
        def call(store: Any, name: Any = None, *about: Any, **options: Any) -> Any:
            main = threading.current_thread() is threading.main_thread()
            if main and not self.slept and str(name).endswith(self._ending):
                self.slept = True
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(self._another).result()
                for lease in self._leases:
                    lease._renewed -= 1000
            return function(store, name, *about, **options)

        return call


def files_of(path: Path) -> dict[str, bytes]:
    """Name → bytes of every file, but for the locks of shards, which a bucket does not keep."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not file.match("commits/*/.lock")
    }


def objects_but_locks(url: str) -> dict[str, bytes]:
    """Name → bytes of every object of a cache that was copied there, but for the locks of shards."""
    return {name: data for name, data in objects_of(url).items() if not name.endswith("/.lock")}
