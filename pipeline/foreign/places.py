"""A folder of files, or a ZIP file that has them, read by name and never followed out of it."""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from typing import TYPE_CHECKING, Protocol

from ...data.edge import printable
from ...data.errors import RepaError
from ...data.storage.files import os_errors
from ...data.storage.regular import open_regular, read_regular
from ..images.listing import check_key
from .arrays import AGAIN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Place(Protocol):
    """Files by name, below one root.

    Attributes:
        name: of the root, for people.
        sizes: name relative to the root, with ``/``, → bytes, sorted; hidden ones are left out.
    """

    name: str
    sizes: dict[str, int]

    def read(self, name: str, most: int) -> bytes:
        """Return the bytes of a file.

        Args:
            name: one of `sizes`.
            most: a longer one is refused.

        Raises:
            RepaError: it cannot be read, or is longer.
        """
        ...


def open_place(path: Path) -> Place:
    """Return the files of a folder or ZIP file.

    Raises:
        RepaError: it is neither, or cannot be listed.
    """
    if path.is_dir():
        return FolderPlace(path)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipPlace(path)
    what = "is no folder and no ZIP file" if path.exists() else "does not exist"
    raise RepaError(f"{path} {what}", "name what the other program wrote", field="FROM")


class FolderPlace:
    """The files of a folder, links to files followed and links to folders not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)
        with os_errors("list", root):
            self.sizes = dict(sorted(self._walk(str(root), "")))

    def _walk(self, folder: str, prefix: str) -> Iterator[tuple[str, int]]:
        stack = [(folder, prefix)]
        while stack:
            folder, prefix = stack.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    check_key(f"{prefix}{entry.name}", self.name)
                    if entry.is_dir(follow_symlinks=False):
                        stack.append((entry.path, f"{prefix}{entry.name}/"))
                    elif entry.is_file():
                        yield f"{prefix}{entry.name}", entry.stat().st_size
                    else:
                        raise RepaError(
                            f"{entry.path} is no file, or a link to none", "mend it, or move it away"
                        )

    def read(self, name: str, most: int) -> bytes:
        """Return the bytes of a file, see `Place.read`."""
        path = self.root / name
        with os_errors("read", path):
            content = read_regular(path, most + 1)
        if len(content) > most:
            raise RepaError(f"{path} has more than {most:,} bytes", AGAIN)
        return content

    def path_of(self, name: str) -> Path:
        """Return where a file lies."""
        return self.root / name


class ZipPlace:
    """The members of a ZIP file, checked against their checksums as they are read."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._lock = threading.Lock()
        with os_errors("read", path):
            try:
                open_regular(path).close()  # a named pipe would be waited for
                self._archive = zipfile.ZipFile(path)  # which it closes by itself
            except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
                raise RepaError(
                    f"{path} is no ZIP file, or damaged ({printable(error)})", AGAIN, field="FROM"
                ) from None
        self.sizes: dict[str, int] = {}
        for info in sorted(self._archive.infolist(), key=lambda each: each.filename):
            if info.is_dir() or any(part.startswith((".", "__MACOSX")) for part in info.filename.split("/")):
                continue
            check_key(info.filename, self.name)
            if info.filename in self.sizes:
                raise RepaError(f"{path} has {info.filename} twice", AGAIN, field="FROM")
            self.sizes[info.filename] = info.file_size

    def read(self, name: str, most: int) -> bytes:
        """Return the bytes of a member, see `Place.read`."""
        where = f"{name} in {self.name}"
        if self.sizes[name] > most:
            raise RepaError(f"{where} has more than {most:,} bytes", AGAIN)
        try:
            with self._lock, os_errors("read", self._path), self._archive.open(name) as file:
                content = file.read(most + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise RepaError(f"{where} is damaged ({printable(error)})", AGAIN) from None
        if len(content) != self.sizes[name]:
            raise RepaError(f"{where} is not as long as its directory says", AGAIN)
        return content
