"""The Zarr document of a cache's group, whose attributes hold the manifest and its checksum.

Everything else in a cache's metadata follows from it; it follows from nothing. So there are two of it: from
format version 2 on the same document lies beside it, written before it and read when it is damaged.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..edge import MOST_BYTES, read_json
from ..errors import CacheError, RepaError
from ..storage.files import os_errors, read_file
from ..storage.writable import open_writable
from .canonical import canonical_sha256
from .layout import CHECKSUM_ATTRIBUTE, COMMITS_FOLDER, GROUP_COPY, GROUP_FILE
from .manifest import ATTRIBUTE

if TYPE_CHECKING:
    from ..storage.bucket import CachePath

_RESTORE = "restore it, or write the cache again in another folder"
_REPAIR = "have it written again by `repa cache repair`"


def read_group(path: CachePath, name: str = GROUP_FILE) -> dict[str, Any]:
    """Read the group's document, its manifest checked against its checksum.

    Args:
        path: folder of the cache, or its prefix in a bucket.
        name: which of the two, `GROUP_FILE` or `GROUP_COPY`.

    Raises:
        CacheError: there is no cache, or the document is damaged.
        RepaError: the operating system refuses.
    """
    file = path / name
    with os_errors("read", file):
        try:
            data = read_file(file, MOST_BYTES)
        except FileNotFoundError as error:
            if _has_commits(path):
                raise CacheError(
                    f"{file} is missing, which says what is in cache {path}", _remedy(path, name)
                ) from error
            raise CacheError(
                f"there is no cache at {path}", f"make one with `repa preprocess --cache {path}`"
            ) from error
    try:
        group = read_json(data, str(file))
        attributes = group["attributes"]
        values = attributes.get(ATTRIBUTE)
    except (CacheError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{file} is damaged or no Zarr v3 group", _remedy(path, name)) from error
    if not isinstance(values, dict):
        if _has_commits(path):
            raise CacheError(
                f"{file} has lost the manifest, which says what is in cache {path}", _remedy(path, name)
            )
        raise CacheError(f"{path} is a Zarr group but no cache of repa", "choose another folder with --cache")
    if canonical_sha256(values) != attributes.get(CHECKSUM_ATTRIBUTE):
        raise CacheError(f"the manifest in {file} does not match its checksum", _remedy(path, name))
    found: dict[str, Any] = group
    return found


def has_sound_copy(path: CachePath) -> bool:
    """Return whether the second document is there and as it was written."""
    try:
        read_group(path, GROUP_COPY)
    except RepaError:
        return False
    return True


def _remedy(path: CachePath, name: str) -> str:
    return _REPAIR if name != GROUP_COPY and has_sound_copy(path) else _RESTORE


def _has_commits(path: CachePath) -> bool:
    with suppress(OSError):  # a bucket may let its objects be read and not listed
        return COMMITS_FOLDER in open_writable(path).names(path)
    return False
