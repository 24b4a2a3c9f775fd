"""Bringing a cache of format version 1 to the version that is written today, in place.

No column is rewritten: its files are the same in both versions. What is added is a digest of the labels, the
array of valid rows, a second document of the group, and in every commit record whose it is and the checksum
of every row, read from behind the rows and proved by the record's own sha256 over all of them.

The manifest changes last, at once, and until then the cache is of version 1, with records of either
version. So an upgrade that was stopped leaves a cache that can be used, and the same call goes on with it.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CacheError
from ..format.commits import read_commit, record_misfit, record_problem
from ..format.layout import GROUP_FILE, VALID, commit_file, shard_file, zarr_documents
from ..format.manifest import FORMAT_VERSION
from ..format.opening import labels_sha256, open_manifest, read_keys, read_labels
from ..format.shard_index import MISSING, decode_index, index_bytes
from ..storage.bucket import REQUESTS, map_files
from ..storage.files import os_errors
from ..storage.folder import unless_changed
from ..storage.local import CHECKSUM_BYTES
from ..storage.writable import open_writable
from ..writing.store import cache_lock, write_manifest
from ..writing.valid_rows import settle_valid
from ..writing.writer import SourceWriter
from .shard_check import open_stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath

_REPAIR = "mend it with `repa cache repair`, then upgrade it"


def upgrade_cache(path: CachePath, progress: Callable[[int, int], None] | None = None) -> bool:
    """Upgrade a cache, or go on with it.

    Args:
        path: folder of the cache, or its prefix in a bucket.
        progress: called with shards done and shards in all, each counted once a source; from several threads.

    Returns:
        Whether there was anything to do.

    Raises:
        CacheError: a process writes the cache; a record, a shard's index or a stored checksum is damaged, or
            a file is not the one that was committed.
        RepaError: the operating system refuses.
    """
    manifest = open_manifest(path)
    if manifest.format_version == FORMAT_VERSION:
        return False
    with ExitStack() as stack:
        for source in manifest.sources:
            stack.enter_context(SourceWriter(path, manifest, source, range(manifest.num_shards)))
        group = stack.enter_context(cache_lock(path))
        stack.enter_context(os_errors("write", path))
        manifest = open_manifest(path)
        read_keys(path, manifest)
        labels = read_labels(path, manifest)
        upgraded = replace(manifest, format_version=FORMAT_VERSION, labels_sha256=labels_sha256(labels))
        shards = [(source, shard) for source in manifest.sources for shard in range(manifest.num_shards)]
        requests = stack.enter_context(ThreadPoolExecutor(REQUESTS))
        done = count(1)

        def upgrade(shard: tuple[str, int]) -> None:
            _upgrade_record(path, manifest, upgraded, *shard, requests)
            if progress is not None:
                progress(next(done), len(shards))

        map_files(upgrade, shards, path)
        document = f"{VALID}/{GROUP_FILE}"
        group.held.check()
        open_writable(path).put(path / VALID / GROUP_FILE, zarr_documents(upgraded)[document])
        settle = partial(settle_valid, path, manifest=upgraded)
        map_files(settle, range(manifest.num_shards), path)
        write_manifest(path, upgraded, group)
    return True


def _upgrade_record(
    path: CachePath, manifest: Manifest, upgraded: Manifest, source: str, shard: int, requests: Executor
) -> None:
    """Give the record of a shard what it lacks. A shard that is not committed has none."""
    folder, record_file = open_writable(path), commit_file(path, source, shard)
    seen = folder.seen(record_file)
    record = read_commit(path, source, shard)
    if record is None:
        return
    columns = manifest.source_columns(source)
    if record.format_version > 1 and record_misfit(upgraded, columns, record) is None:
        return
    problem = record_problem(path, manifest, source, record, columns)
    if problem is not None:
        raise CacheError(
            f"shard {shard} of {source} cannot be upgraded: {problem.what}", _REPAIR, field=source
        )
    whole = {}
    for name, spec in columns.items():
        file = shard_file(path, name, spec, shard)
        try:
            table, index_crc32c = _stored_checksums(file, manifest, requests)
        except CacheError as error:
            raise CacheError(error.what, _REPAIR, field=name) from error
        if hashlib.sha256(table).hexdigest() != record.columns[name].chunks_sha256:
            what = f"shard {shard} of {name} cannot be upgraded: {file} is not the file that was committed"
            raise CacheError(what, _REPAIR, field=name)
        whole[name] = replace(record.columns[name], chunks_crc32c=table, index_crc32c=index_crc32c)
    record = replace(
        record, columns=whole, cache=upgraded.identity, source=upgraded.source_identities[source]
    )
    with unless_changed(record_file):
        folder.put_if(record_file, record.encode(), seen)


def _stored_checksums(file: CachePath, manifest: Manifest, requests: Executor) -> tuple[bytes, int]:
    """Return the checksum behind every chunk, ``uint32 [rows, V]`` as bytes, and that of the index.

    Raises:
        CacheError: the file is too short, or its index damaged.
    """
    shape = (manifest.shard_rows, len(manifest.views))
    with open_stored(file, requests) as stored:
        size, tail = stored.size, stored.tail(index_bytes(*shape))
        index = decode_index(tail, size, str(file), *shape)
        table = np.zeros(shape, dtype="<u4")
        chunks, ranges = [], []
        for chunk in np.ndindex(shape):
            offset, length = index[chunk].tolist()
            if offset != MISSING and CHECKSUM_BYTES < length <= size and offset + length <= size:
                chunks.append(chunk)
                ranges.append((offset + length - CHECKSUM_BYTES, CHECKSUM_BYTES))
        for number, data in stored.chunks(ranges):
            table[chunks[number]] = int.from_bytes(data, "little")
    return table.tobytes(), int.from_bytes(tail[-CHECKSUM_BYTES:], "little")
