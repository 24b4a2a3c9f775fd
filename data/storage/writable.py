"""The storage that a cache is written to, by its path."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .bucket_folder import BucketFolder
from .files import nearest_folder
from .local_folder import LocalFolder

if TYPE_CHECKING:
    from .bucket import CachePath
    from .folder import Folder


def open_writable(path: CachePath) -> Folder:
    """Return what writes below a folder, or below a prefix of a bucket."""
    return LocalFolder(path) if isinstance(path, Path) else BucketFolder(path)


def free_bytes(path: CachePath) -> int | None:
    """Return how many bytes its disk has free. A bucket does not say, and has no end: it is None."""
    return shutil.disk_usage(nearest_folder(path)).free if isinstance(path, Path) else None


def measurable_folder(path: CachePath) -> Path | None:
    """Return the folder nearest to a path, whose disk can be measured. A bucket has none: it is None."""
    return nearest_folder(path) if isinstance(path, Path) else None


def file_in_the_way(path: CachePath) -> Path | None:
    """Return the file that stands where a folder is to be, or a folder above it, or None."""
    if isinstance(path, Path):
        for each in (path, *path.parents):
            if each.exists() and not each.is_dir():
                return each
    return None


def refusing_folder(path: CachePath) -> Path | None:
    """Return the folder that a cache would be made in, where this user may not write there, or None.

    Raises:
        CacheError: the store of a bucket cannot keep writers apart.
        OSError: a bucket refuses a small object, which is removed again.
    """
    if not isinstance(path, Path):
        BucketFolder(path).probe()
        return None
    folder = nearest_folder(path)
    return None if os.access(folder, os.W_OK | os.X_OK) else folder
