"""Keeping the array ``valid`` in step with the commit records (`format.valid`)."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import CacheError
from ..format.commits import read_commit
from ..format.layout import valid_chunk
from ..format.valid import encode_valid
from ..storage.folder import unless_changed
from ..storage.writable import open_writable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..format.commits import CommitRecord
    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath

_NO_RECORDS: Mapping[str, CommitRecord] = {}


def settle_valid(
    path: CachePath, manifest: Manifest, shard: int, about: Mapping[str, CommitRecord] = _NO_RECORDS
) -> None:
    """Have the chunk of a shard say what its records say. The caller holds the cache's lock,
    or the part of it that is the shard's.

    Args:
        path: folder of the cache.
        manifest: its manifest, with the array.
        shard: index of the shard.
        about: source → record that is about to be written.

    Raises:
        CacheError: another process has written it meanwhile.
        OSError: the operating system refuses.
    """
    file, folder = valid_chunk(path, shard), open_writable(path)
    # before the records are read: who slept since then is not to say what they said
    there, seen = folder.look(file)
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
