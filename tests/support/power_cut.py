"""A power cut, simulated: of a folder only what was synced is there afterwards."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


class Disk:
    """Watches every fsync under a folder, and knows what a power cut would leave of it.

    A file has the bytes of its last fsync, none if there was none. A name is there, or gone, or another file,
    as of the last fsync of its folder. This is the least that POSIX promises; real disks keep more.

    Args:
        root: the folder.
        patch: of the test.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self._root = root
        # inodes are not given again while somebody holds them open
        self._held: dict[int, int] = {}
        self._bytes: dict[int, bytes] = {}
        self._names: dict[Path, dict[str, int]] = {}
        patch.setattr(os, "fsync", self._sync)

    def _sync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_relative_to(self._root):
            return
        status = os.fstat(descriptor)
        if not stat.S_ISDIR(status.st_mode):
            if status.st_ino not in self._held:
                self._held[status.st_ino] = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
            self._bytes[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            return
        self._names[path] = {entry.name: entry.inode() for entry in os.scandir(path)}

    def after_a_cut(self, target: Path) -> Path:
        """Write what is left into another folder, and return it."""
        shutil.rmtree(target, ignore_errors=True)
        self._restore(self._root, target)
        return target

    def _restore(self, folder: Path, target: Path) -> None:
        target.mkdir()
        for name, inode in self._names.get(folder, {}).items():
            if folder / name in self._names:
                self._restore(folder / name, target / name)
            elif inode in self._bytes:
                (target / name).write_bytes(self._bytes[inode])
            elif (folder / name).is_file():
                (target / name).write_bytes(b"")

    def close(self) -> None:
        """Let go of the files."""
        for descriptor in self._held.values():
            os.close(descriptor)
