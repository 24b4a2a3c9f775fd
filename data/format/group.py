"""The Zarr document of a cache's group, whose attributes hold the manifest and its checksum.

Everything else in a cache's metadata follows from it; it follows from nothing. So where it is damaged, only
what its checksum proves is taken from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..edge import MOST_BYTES, read_json
from ..errors import CacheError
from ..storage.files import os_errors, read_file
from .layout import CHECKSUM_ATTRIBUTE, COMMITS_FOLDER, GROUP_FILE, canonical_json
from .manifest import ATTRIBUTE, Manifest

if TYPE_CHECKING:
    from ..storage.bucket import CachePath

_RESTORE = "restore it, or write the cache again in another folder"
_REPAIR = "have it written again by `repa cache repair`"
_BEGIN = re.compile(rf'"{ATTRIBUTE}"\s*:\s*')
_STRING = re.compile(r'"([^"]*)')
_BEGINNINGS = 64
_ENOUGH = 32  # of the 64 hex digits of a checksum: half of them do not agree by chance


def read_group(path: CachePath) -> dict[str, Any]:
    """The group's document, its manifest checked against its checksum.

    Args:
        path: folder of the cache, or its prefix in a bucket.

    Raises:
        CacheError: there is no cache, or the document is damaged.
        RepaError: the operating system refuses.
    """
    file = path / GROUP_FILE
    with os_errors("read", file):
        try:
            data = read_file(file, MOST_BYTES)
        except FileNotFoundError as error:
            if _has_commits(path):
                raise CacheError(
                    f"{file} is missing, which says what is in cache {path}", f"{_RESTORE}"
                ) from error
            local = isinstance(path, Path)
            remedy = f"make one with `repa preprocess --cache {path}`" if local else "copy one there"
            raise CacheError(f"there is no cache at {path}", f"{remedy}") from error
    try:
        group = read_json(data, str(file))
        attributes = group["attributes"]
        values = attributes.get(ATTRIBUTE)
    except (CacheError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{file} is damaged or no Zarr v3 group", f"{_remedy(path, data)}") from error
    if not isinstance(values, dict):
        if _has_commits(path):
            raise CacheError(
                f"{file} has lost the manifest, which says what is in cache {path}", f"{_remedy(path, data)}"
            )
        raise CacheError(f"{path} is a Zarr group but no cache of repa", "choose another folder with --cache")
    if hashlib.sha256(canonical_json(values)).hexdigest() != attributes.get(CHECKSUM_ATTRIBUTE):
        raise CacheError(f"the manifest in {file} does not match its checksum", f"{_remedy(path, data)}")
    found: dict[str, Any] = group
    return found


def rescued_manifest(data: bytes) -> Manifest | None:
    """The manifest in a group's document, whatever the rest of it has become: proved by its checksum.

    Of the checksum half may be lost: a manifest that is not the one it was made from agrees with it in four
    digits of 64. That proves it, and nothing weaker does.

    Args:
        data: what is left of the document.

    Returns:
        None where no manifest is left that is as it was written.
    """
    text = data.decode("utf-8", "replace")
    # a document that others made may begin a manifest a million times
    for begin in islice(_BEGIN.finditer(text), _BEGINNINGS):
        try:
            values, end = json.JSONDecoder().raw_decode(text, begin.end())
            digest = hashlib.sha256(canonical_json(values)).hexdigest()
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue
        for found in _STRING.findall(text[end:]):
            if sum(here == there for here, there in zip(digest, found, strict=False)) >= _ENOUGH:
                return Manifest.from_json(values, where=GROUP_FILE)
    return None


def _remedy(path: CachePath, data: bytes) -> str:
    if not isinstance(path, Path):
        return "copy it there again"
    return _RESTORE if rescued_manifest(data) is None else _REPAIR


def _has_commits(path: CachePath) -> bool:
    return isinstance(path, Path) and (path / COMMITS_FOLDER).is_dir()
