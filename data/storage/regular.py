"""Files of others, opened only where they are files, as a FIFO would be waited for without end."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def other_kind(mode: int) -> str:
    """Say what a path that is no regular file is, empty of one that is.

    Args:
        mode: ``st_mode`` of its `os.stat`, links followed.
    """
    return "" if stat.S_ISREG(mode) else next((name for test, name in _KINDS if test(mode)), "no file")


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading bytes, links followed.

    Raises:
        OSError: it cannot be opened, or is no regular file but, as its message says, something else.
    """
    # a FIFO opens at once without waiting for a writer, and is then seen for what it is
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        kind = other_kind(os.fstat(descriptor).st_mode)
        if kind:
            code = errno.EISDIR if kind == "a folder" else errno.EINVAL
            raise OSError(code, f"it is {kind}, not a file", str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, most: int | None = None) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: of the file.
        most: of a longer file read so many and no more; None reads all.

    Raises:
        OSError: see `open_regular`.
    """
    with open_regular(path) as file:
        # room for what is asked for is taken first, so ask for the whole where it is shorter
        if most is None or os.fstat(file.fileno()).st_size <= most:
            return file.read()
        return file.read(most)
