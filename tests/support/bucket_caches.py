"""Writers of a cache in a bucket that are killed between two requests, and what it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa.data.storage import leases
from s3_server import obstore

if TYPE_CHECKING:
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


def files_of(path: Path) -> dict[str, bytes]:
    """Name → bytes of every file, but for the locks of shards, which a bucket does not keep."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not file.match("commits/*/.lock")
    }
