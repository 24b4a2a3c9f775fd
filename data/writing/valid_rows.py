"""Keeping the array ``valid`` in step with the commit records (`format.valid`)."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import CacheError
from ..format.commits import read_commit
from ..format.layout import LOCK_FILE, valid_chunk
from ..format.opening import open_manifest
from ..format.valid import encode_valid
from ..storage.bucket import map_files
from ..storage.files import os_errors
from ..storage.folder import unless_changed
from ..storage.writable import open_writable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..format.commits import CommitRecord
    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath

_NO_RECORDS: Mapping[str, CommitRecord] = {}


def settle_all_valid(path: CachePath, manifest: Manifest) -> None:
    """Have the array say of every shard what its records say, a lock for each at a time.

    Args:
        path: folder of the cache.
        manifest: its manifest; of format version 1, there is no such array.

    Raises:
        RepaError: the operating system refuses.
    """
    folder = open_writable(path)

    def settle(shard: int) -> None:
        with folder.locked(path / LOCK_FILE, shard):
            settle_valid(path, shard)

    if manifest.format_version > 1:
        with os_errors("write", path):
            map_files(settle, range(manifest.num_shards), path)


def settle_valid(
    path: CachePath,
    shard: int,
    about: Mapping[str, CommitRecord] = _NO_RECORDS,
    *,
    manifest: Manifest | None = None,
) -> None:
    """Have the chunk of a shard say what its records say. The caller holds the cache's lock,
    or the part of it that is the shard's.

    Args:
        path: folder of the cache.
        shard: index of the shard.
        about: source → record that is about to be written.
        manifest: of the cache, with the array; None: the one that is there.

    Raises:
        CacheError: another process has written it meanwhile.
        OSError: the operating system refuses.
    """
    file, folder = valid_chunk(path, shard), open_writable(path)
    # before the manifest and the records are read: who slept since then is not to say what they said
    there, seen = folder.look(file)
    if manifest is None:
        manifest = open_manifest(path)
    records = dict(about)
    for source in manifest.sources:
        if source not in records:
            # a damaged record says nothing; when its shard is written again, so is the array
            with suppress(CacheError):
                record = read_commit(path, source, shard)
                if record is not None:
                    records[source] = record
    if not records:
        folder.remove([file])
        return
    invalid = {row for record in records.values() for row in record.invalid}
    data = encode_valid(manifest, shard, invalid.intersection(manifest.shard_range(shard)))
    if there != data:
        with unless_changed(file):
            folder.put_if(file, data, seen)
