"""Creating a cache, and declaring what it is to hold.

Several processes may call `ensure_cache` and `ensure_source` at once, with equal content; they take turns
on ``<cache>/.lock``.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CacheError
from ..format.columns import AUTOENCODER, model_of, source_of
from ..format.group import read_group
from ..format.layout import (
    CALIBRATION_FOLDER,
    CHUNK_FOLDER,
    GROUP_COPY,
    GROUP_FILE,
    KEYS_FILE,
    LOCK_FILE,
    commit_folder,
    group_attributes,
    zarr_documents,
)
from ..format.notes import TOKENIZER_NOTE
from ..format.opening import declaration, differences, labels_sha256, open_manifest, read_labels
from ..format.survey import committed_shards
from ..storage.files import os_errors, partial_name
from ..storage.folder import unless_changed
from ..storage.writable import open_writable
from .writer import SourceWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ..format.columns import ColumnSpec
    from ..format.manifest import Manifest, Provenance
    from ..storage.bucket import CachePath
    from ..storage.folder import Held, Seen


@dataclass(frozen=True, kw_only=True)
class LockedGroup:
    """The lock of a cache, and the documents of its group as they were when it was taken.

    Attributes:
        held: the lock, to be looked at before what names nothing that it replaces.
        document: what a writer of the document is to name.
        copy: of the second one.
    """

    held: Held
    document: Seen
    copy: Seen


def keys_sha256(keys: Sequence[str]) -> str:
    """Compute the manifest's ``keys_sha256`` of these keys, the hex sha256 of the bytes of ``keys.txt``.

    Raises:
        CacheError: a key that cannot be a line of UTF-8.
    """
    return hashlib.sha256(encode_keys(keys)).hexdigest()


def create_cache(path: CachePath, manifest: Manifest, keys: Sequence[str], labels: NDArray[np.int32]) -> None:
    """Make a cache without sources. It exists once its ``zarr.json`` does, which comes last.

    Args:
        path: its folder, absent or empty (or left by a process killed at this).
        manifest: what it is.
        keys: image key of every row.
        labels: int32 ``[N]``.

    Raises:
        CacheError: the folder is a cache already, or holds something else.
        RepaError: the operating system refuses.
        ValueError: manifest, keys and labels contradict one another.
    """
    with cache_lock(path) as group:
        if _is_there(path):
            raise CacheError(f"{path} is a cache already", "choose another folder with --cache, or delete it")
        _create(path, manifest, keys, labels, group)


def ensure_cache(
    path: CachePath, manifest: Manifest, keys: Sequence[str], labels: NDArray[np.int32]
) -> Manifest:
    """Return the manifest of the cache at ``path``, which is made if it is not there.

    Args:
        path: its folder.
        manifest: what the cache must be; its columns and sources are not compared.
        keys: image key of every row.
        labels: int32 ``[N]``.

    Raises:
        CacheError: there is another cache, and how it differs; or something else.
        RepaError: the operating system refuses.
        ValueError: manifest, keys and labels contradict one another.
    """
    if not _is_there(path):
        with cache_lock(path) as group:
            if not _is_there(path):
                _create(path, manifest, keys, labels, group)
    present = open_manifest(path)
    different = differences(_fixed(present, present), _fixed(manifest, present))
    if different:
        raise CacheError(
            f"{path} is a cache of something else: {different}",
            "give the same --data and flags as it was made with, or choose another folder with --cache",
        )
    if not np.array_equal(read_labels(path, present), labels):
        raise CacheError(f"{path} has other labels than these images", "choose another folder with --cache")
    return present


def ensure_source(
    path: CachePath, source: str, provenance: Provenance, columns: Mapping[str, ColumnSpec]
) -> Manifest:
    """Declare a source and its columns, or check that it was declared alike. Nothing else changes.

    A declaration binds from the first committed shard on: before that, and while nobody writes the source,
    another takes its place, so that a first attempt that failed can be repeated in another way.

    Args:
        path: folder of the cache.
        source: name of the source.
        provenance: where its columns come from; compared but for library versions.
        columns: name → spec of all its columns.

    Raises:
        CacheError: the source is there with another provenance or other columns, and how they differ.
        RepaError: the operating system refuses.
    """
    for column in columns:
        if source_of(column) != source:
            raise ValueError(f"column {column} is not of source {source}")
    manifest = open_manifest(path)
    if source not in manifest.sources:
        with cache_lock(path) as group:
            manifest = open_manifest(path)
            if source not in manifest.sources:
                _forget_records(path, source, group)
                _forget_rows(path, columns, group)
                return _declare(path, manifest.with_source(source, provenance, columns), source, group)
    different = differences(
        declaration(manifest.sources[source], manifest.source_columns(source)),
        declaration(provenance, columns),
    )
    if different and not committed_shards(path, manifest, source):
        # all locks are taken, so that no other process is about to commit by the old declaration
        everything = SourceWriter(path, manifest, source, range(manifest.num_shards))
        with everything, cache_lock(path) as group:
            if not committed_shards(path, manifest, source):
                before = manifest.source_columns(source)
                # rows of another form may lie in folders where those of this one are files
                _forget_rows(path, before, group)
                replaced = open_manifest(path).with_source(source, provenance, columns)
                declared = _declare(path, replaced, source, group)
                _forget_columns(path, before.keys() - columns.keys(), group)
                return declared
    if different:
        flag = "--vae" if source == AUTOENCODER else "--encoder"
        flag = "--text-encoder" if TOKENIZER_NOTE in provenance.notes else flag
        raise CacheError(
            f"cache {path} has {source} from another model or in another form: {different}",
            f"use the {flag} and flags it was made with, or choose another folder with --cache",
        )
    return manifest


def metadata_documents(path: CachePath, manifest: Manifest) -> dict[str, bytes]:
    """Make every Zarr metadata document of a cache from ``manifest``, relative path → bytes.

    Raises:
        CacheError: the group's own document, whose other attributes are kept, is missing or damaged.
        RepaError: the operating system refuses, or a compressor needs a package that is not installed.
    """
    # attributes that others have put there are theirs to keep
    attributes = {**read_group(path)["attributes"], **group_attributes(manifest)}
    return zarr_documents(manifest, attributes=attributes)


def refuse_foreign_folder(path: CachePath) -> None:
    """Look at the folder of a cache that may not be there yet, before anything is put into it.

    Raises:
        CacheError: it holds something else.
        RepaError: the operating system refuses.
    """
    folder = open_writable(path)
    with os_errors("read", path):
        left = any(name != CALIBRATION_FOLDER for name in folder.names(path))
        # looked at afterwards: what another process is making begins with its lock
        if left and not any(folder.exists(path / name) for name in (LOCK_FILE, GROUP_FILE)):
            raise CacheError(f"{path} is not empty and no cache", "choose another folder with --cache")


@contextmanager
def cache_lock(path: CachePath) -> Iterator[LockedGroup]:
    """Hold the cache's lock, which declares sources and changes the manifest one process at a time.

    Args:
        path: folder of the cache; made if it is not there.

    Yields:
        What is locked, as it was seen then.

    Raises:
        CacheError: the folder holds something else, and is left as it is.
        RepaError: the operating system refuses.
    """
    refuse_foreign_folder(path)
    folder = open_writable(path)
    with os_errors("write", path), folder.locked(path / LOCK_FILE) as held:
        copy = folder.seen(path / GROUP_COPY)
        yield LockedGroup(held=held, document=folder.seen(path / GROUP_FILE), copy=copy)


def _is_there(path: CachePath) -> bool:
    with os_errors("read", path):
        return open_writable(path).exists(path / GROUP_FILE)


def _create(
    path: CachePath, manifest: Manifest, keys: Sequence[str], labels: NDArray[np.int32], locked: LockedGroup
) -> None:
    data = encode_keys(keys)
    if not manifest.num_rows == len(keys) == len(labels) or labels.dtype != np.int32:
        raise ValueError(f"{manifest.num_rows} rows, {len(keys)} keys, labels {labels.dtype}[{len(labels)}]")
    if hashlib.sha256(data).hexdigest() != manifest.keys_sha256:
        raise ValueError("keys_sha256 of the manifest is not the one of the keys")
    if manifest.format_version > 1 and labels_sha256(labels) != manifest.labels_sha256:
        raise ValueError("labels_sha256 of the manifest is not the one of the labels")
    documents = zarr_documents(manifest, labels=labels)
    files = {KEYS_FILE: data, **documents}
    left = {LOCK_FILE, partial_name(GROUP_FILE), partial_name(KEYS_FILE)}
    left |= {name.split("/")[0] for name in (*files, CALIBRATION_FOLDER)}
    left |= {GROUP_COPY, partial_name(GROUP_COPY)}
    folder = open_writable(path)
    foreign = [name for name in folder.names(path) if name not in left]
    if foreign:
        raise CacheError(
            f"{path} holds {path / foreign[0]}, which is no cache's", "choose another folder with --cache"
        )
    group = files.pop(GROUP_FILE)
    for name, content in files.items():
        locked.held.check()
        folder.put(path / name, content)
    write_group(path, manifest, group, locked)
    folder.settle()


def _forget_records(path: CachePath, source: str, locked: LockedGroup) -> None:
    """Remove records that a drop has left. They stand for what was declared before."""
    records, folder = commit_folder(path, source), open_writable(path)
    with os_errors("remove", records):
        left = [records / name for name in folder.names(records) if name.endswith(".json")]
        locked.held.check()
        folder.remove(left)


def _forget_rows(path: CachePath, columns: Iterable[str], locked: LockedGroup) -> None:
    """Remove what has been written of columns of which nothing is committed."""
    for column in columns:
        rows = path / column / CHUNK_FOLDER
        with os_errors("remove", rows):
            open_writable(path).remove_all(rows, locked.held)


def _forget_columns(path: CachePath, columns: Iterable[str], locked: LockedGroup) -> None:
    """Remove the folders of columns that are declared no more."""
    for column in columns:
        with os_errors("remove", path / column):
            open_writable(path).remove_all(path / column, locked.held)


def _declare(path: CachePath, manifest: Manifest, source: str, locked: LockedGroup) -> Manifest:
    documents = metadata_documents(path, manifest)
    own = {f"{name}/{GROUP_FILE}" for name in manifest.source_columns(source)}
    model = f"{model_of(source)}/{GROUP_FILE}"
    folder = open_writable(path)
    for name, content in documents.items():
        if name in own or (name == model and not folder.exists(path / name)):
            locked.held.check()
            folder.put(path / name, content)
    write_group(path, manifest, documents[GROUP_FILE], locked)
    return manifest


def write_manifest(path: CachePath, manifest: Manifest, locked: LockedGroup) -> None:
    """Put another manifest into the group of a cache, whose lock the caller holds.

    Args:
        path: folder of the cache.
        manifest: the manifest.
        locked: the group, as `cache_lock` gave it.

    Raises:
        CacheError: the group's document, whose other attributes are kept, is damaged.
        OSError: the operating system refuses.
    """
    write_group(path, manifest, metadata_documents(path, manifest)[GROUP_FILE], locked)


def write_group(path: CachePath, manifest: Manifest, document: bytes, locked: LockedGroup) -> None:
    """Write both documents of a cache's group, the one that counts last.

    Killed in between, the second document may know of a source that nobody has written anything of.

    Args:
        path: folder of the cache, whose lock the caller holds.
        manifest: in the document; of format version 1, there is one document.
        document: its bytes.
        locked: the group, as `cache_lock` gave it.

    Raises:
        CacheError: another process has written it meanwhile.
        OSError: the operating system refuses.
    """
    folder = open_writable(path)
    with unless_changed(path / GROUP_FILE):
        if manifest.format_version > 1:
            folder.put_if(path / GROUP_COPY, document, locked.copy)
        folder.put_if(path / GROUP_FILE, document, locked.document)


def encode_keys(keys: Sequence[str]) -> bytes:
    """Write the bytes of ``keys.txt``.

    Raises:
        CacheError: a key that cannot be a line of UTF-8.
    """
    for key in keys:
        if "\n" in key:
            raise CacheError(f"image key {key!r} has a line break", "rename the file")
    try:
        return "".join(f"{key}\n" for key in keys).encode()
    except UnicodeEncodeError as error:
        bad = next(key for key in keys if not _encodes(key))
        raise CacheError(f"image key {bad!r} is not UTF-8", "rename the file") from error


def _encodes(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fixed(manifest: Manifest, present: Manifest) -> dict[str, Any]:
    """Return what two manifests of one cache share, as far as the version of the one that is there has it."""
    later = {"format_version", "labels_sha256"} if present.format_version == 1 else set()
    return {name: value for name, value in manifest.fixed().items() if name not in later}
