"""What was fitted to some of the images before a source was written, kept beside the manifest.

The projections that cut a teacher's queries and keys to a rank are fitted once and hold for every shard:
``calibration/<source>.safetensors``. Of many processes one fits and the others wait for its bytes. The notes
of the source's provenance carry their sha256, ``notes["calibration"]["sha256"]``.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from ..errors import CacheError
from ..format.layout import GROUP_FILE, calibration_file, calibration_lock
from ..format.opening import open_manifest
from ..format.survey import committed_shards
from ..storage.files import os_errors, read_file
from ..storage.folder import unless_changed
from ..storage.writable import open_writable
from .store import refuse_foreign_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..format.manifest import Provenance
    from ..storage.bucket import CachePath

NOTE = "calibration"
_MOST_BYTES = 1 << 28


def ensure_calibration(
    path: CachePath,
    source: str,
    compute: Callable[[], bytes],
    *,
    usable: Callable[[bytes], bool] | None = None,
) -> bytes:
    """Return the calibration of a source, computed and stored if it is not there.

    Processes and threads that ask at once take turns: one computes, the others get its bytes. It binds as a
    declaration does, from the first committed shard on: before that, one that is not usable is replaced.

    The cache need not exist yet, so that what cannot be calibrated leaves nothing behind.

    Args:
        path: folder of the cache.
        source: name of the source, declared or not.
        compute: makes the bytes; may open the cache and declare its sources.
        usable: whether bytes that are there are what is wanted; any are, by default.

    Returns:
        The bytes of the file.

    Raises:
        CacheError: committed shards rely on another calibration; the folder holds something else.
        RepaError: the operating system refuses.
    """
    file, lock = calibration_file(path, source), calibration_lock(path, source)
    refuse_foreign_folder(path)
    folder = open_writable(path)
    with ExitStack() as stack:
        with os_errors("write", lock):
            stack.enter_context(folder.locked(lock))
            seen = folder.seen(file)
        relied_on = _relied_on(path, source)
        stored = read_calibration(path, source)
        fits = stored is not None and (usable is None or usable(stored))
        if stored is not None and relied_on is not None:
            check_calibration(file, stored, relied_on)
        if stored is not None and fits:
            return stored
        if stored is not None and relied_on is not None:
            raise CacheError(
                f"the committed shards of {source} in {path} were written with another calibration",
                "use the flags they were made with, or choose another folder with --cache",
            )
        try:
            computed = compute()
        except BaseException:
            _leave_nothing(path, lock)
            raise
        if relied_on is not None:
            check_calibration(file, computed, relied_on)
        with os_errors("write", file), unless_changed(file):
            folder.put_if(file, computed, seen)
        return computed


def read_calibration(path: CachePath, source: str) -> bytes | None:
    """Read the calibration of a source as it is on disk, or None.

    Args:
        path: folder of the cache.
        source: name of the source.

    Raises:
        RepaError: the operating system refuses.
    """
    file = calibration_file(path, source)
    with os_errors("read", file):
        try:
            return read_file(file, _MOST_BYTES)
        except FileNotFoundError:
            return None


def recorded_sha256(provenance: Provenance) -> str | None:
    """Return the sha256 of the calibration that a source was written with, by its notes.

    It is None without one.
    """
    note = provenance.notes.get(NOTE)
    return None if note is None else str(note["sha256"])


def check_calibration(file: CachePath, data: bytes, recorded: str) -> None:
    """Compare a calibration with the sha256 that its source's notes record.

    Raises:
        CacheError: it is another one.
    """
    if hashlib.sha256(data).hexdigest() != recorded:
        raise CacheError(
            f"{file} does not match its checksum in the manifest",
            "restore it, or have it fitted again by `repa cache repair`",
        )


def _relied_on(path: CachePath, source: str) -> str | None:
    """Return the sha256 of the calibration that committed shards rely on."""
    if not open_writable(path).exists(path / GROUP_FILE):
        return None
    manifest = open_manifest(path)
    if source not in manifest.sources or not committed_shards(path, manifest, source):
        return None
    return recorded_sha256(manifest.sources[source])


def _leave_nothing(path: CachePath, lock: CachePath) -> None:
    """Remove the folders of a cache that was not to be. Another process that waits comes to the same end."""
    folder = open_writable(path)
    with suppress(OSError):
        if not folder.exists(path / GROUP_FILE):
            folder.remove([lock])
            folder.remove_if_empty(lock.parent)
            folder.remove_if_empty(path)
