"""Creating a cache, and declaring what it is to hold.

Several processes may call `ensure_cache` and `ensure_source` at once, with equal content; they take turns
on ``<cache>/.lock``.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import contextmanager
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
from ..storage.files import locked, make_folder, os_errors, partial_path, sync_folders, write_file
from .writer import SourceWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..format.columns import ColumnSpec
    from ..format.manifest import Manifest, Provenance


def keys_sha256(keys: Sequence[str]) -> str:
    """Compute the manifest's ``keys_sha256`` of these keys, the hex sha256 of the bytes of ``keys.txt``.

    Raises:
        CacheError: a key that cannot be a line of UTF-8.
    """
    return hashlib.sha256(encode_keys(keys)).hexdigest()


def create_cache(path: Path, manifest: Manifest, keys: Sequence[str], labels: NDArray[np.int32]) -> None:
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
    with cache_lock(path):
        if (path / GROUP_FILE).exists():
            raise CacheError(f"{path} is a cache already", "choose another folder with --cache, or delete it")
        _create(path, manifest, keys, labels)


def ensure_cache(path: Path, manifest: Manifest, keys: Sequence[str], labels: NDArray[np.int32]) -> Manifest:
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
    if not (path / GROUP_FILE).exists():
        with cache_lock(path):
            if not (path / GROUP_FILE).exists():
                _create(path, manifest, keys, labels)
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
    path: Path, source: str, provenance: Provenance, columns: Mapping[str, ColumnSpec]
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
        with cache_lock(path):
            manifest = open_manifest(path)
            if source not in manifest.sources:
                _forget_records(path, source)
                _forget_rows(path, columns)
                return _declare(path, manifest.with_source(source, provenance, columns), source)
    different = differences(
        declaration(manifest.sources[source], manifest.source_columns(source)),
        declaration(provenance, columns),
    )
    if different and not committed_shards(path, manifest, source):
        # all locks are taken, so that no other process is about to commit by the old declaration
        with SourceWriter(path, manifest, source, range(manifest.num_shards)), cache_lock(path):
            if not committed_shards(path, manifest, source):
                before = manifest.source_columns(source)
                # rows of another form may lie in folders where those of this one are files
                _forget_rows(path, before)
                replaced = open_manifest(path).with_source(source, provenance, columns)
                declared = _declare(path, replaced, source)
                _forget_columns(path, before.keys() - columns.keys())
                return declared
    if different:
        flag = "--vae" if source == AUTOENCODER else "--encoder"
        flag = "--text-encoder" if TOKENIZER_NOTE in provenance.notes else flag
        raise CacheError(
            f"cache {path} has {source} from another model or in another form: {different}",
            f"use the {flag} and flags it was made with, or choose another folder with --cache",
        )
    return manifest


def metadata_documents(path: Path, manifest: Manifest) -> dict[str, bytes]:
    """Make every Zarr metadata document of a cache from ``manifest``, relative path → bytes.

    Raises:
        CacheError: the group's own document, whose other attributes are kept, is missing or damaged.
        RepaError: the operating system refuses, or a compressor needs a package that is not installed.
    """
    # attributes that others have put there are theirs to keep
    attributes = {**read_group(path)["attributes"], **group_attributes(manifest)}
    return zarr_documents(manifest, attributes=attributes)


def refuse_foreign_folder(path: Path) -> None:
    """Look at the folder of a cache that may not be there yet, before anything is put into it.

    Raises:
        CacheError: it holds something else.
        RepaError: the operating system refuses.
    """
    with os_errors("read", path):
        left = path.is_dir() and any(each.name != CALIBRATION_FOLDER for each in path.iterdir())
        # looked at afterwards: what another process is making begins with its lock
        if left and not any((path / name).exists() for name in (LOCK_FILE, GROUP_FILE)):
            raise CacheError(f"{path} is not empty and no cache", "choose another folder with --cache")


@contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Hold the cache's lock, which declares sources and changes the manifest one process at a time.

    Args:
        path: folder of the cache; made if it is not there.

    Raises:
        CacheError: the folder holds something else, and is left as it is.
        RepaError: the operating system refuses.
    """
    refuse_foreign_folder(path)
    with os_errors("write", path):
        make_folder(path)
        with locked(path / LOCK_FILE):
            yield


def _create(path: Path, manifest: Manifest, keys: Sequence[str], labels: NDArray[np.int32]) -> None:
    data = encode_keys(keys)
    if not manifest.num_rows == len(keys) == len(labels) or labels.dtype != np.int32:
        raise ValueError(f"{manifest.num_rows} rows, {len(keys)} keys, labels {labels.dtype}[{len(labels)}]")
    if hashlib.sha256(data).hexdigest() != manifest.keys_sha256:
        raise ValueError("keys_sha256 of the manifest is not the one of the keys")
    if manifest.format_version > 1 and labels_sha256(labels) != manifest.labels_sha256:
        raise ValueError("labels_sha256 of the manifest is not the one of the labels")
    documents = zarr_documents(manifest, labels=labels)
    files = {KEYS_FILE: data, **documents}
    left = {path / LOCK_FILE, partial_path(path / GROUP_FILE), partial_path(path / KEYS_FILE)}
    left |= {path / name.split("/")[0] for name in (*files, CALIBRATION_FOLDER)}
    left |= {path / GROUP_COPY, partial_path(path / GROUP_COPY)}
    foreign = sorted(str(each) for each in path.iterdir() if each not in left)
    if foreign:
        raise CacheError(
            f"{path} holds {foreign[0]}, which is no cache's", "choose another folder with --cache"
        )
    group = files.pop(GROUP_FILE)
    for name, content in files.items():
        write_file(path / name, content, path)
    write_group(path, manifest, group)
    sync_folders(path.parent, path.parent)


def _forget_records(path: Path, source: str) -> None:
    """Remove records that a drop has left. They stand for what was declared before."""
    folder = commit_folder(path, source)
    with os_errors("remove", folder):
        left = sorted(folder.glob("*.json"))
        for record in left:
            record.unlink()
        if left:
            sync_folders(folder, path)


def _forget_rows(path: Path, columns: Iterable[str]) -> None:
    """Remove what has been written of columns of which nothing is committed."""
    for column in columns:
        rows = path / column / CHUNK_FOLDER
        with os_errors("remove", rows):
            if rows.is_dir() and not rows.is_symlink():
                shutil.rmtree(rows)
                sync_folders(rows.parent, path)


def _forget_columns(path: Path, columns: Iterable[str]) -> None:
    """Remove the folders of columns that are declared no more."""
    for column in columns:
        folder = path / column
        with os_errors("remove", folder):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
                sync_folders(folder.parent, path)


def _declare(path: Path, manifest: Manifest, source: str) -> Manifest:
    documents = metadata_documents(path, manifest)
    own = {f"{name}/{GROUP_FILE}" for name in manifest.source_columns(source)}
    model = f"{model_of(source)}/{GROUP_FILE}"
    for name, content in documents.items():
        if name in own or (name == model and not (path / name).exists()):
            write_file(path / name, content, path)
    write_group(path, manifest, documents[GROUP_FILE])
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Put another manifest into the group of a cache, whose lock the caller holds.

    Args:
        path: folder of the cache.
        manifest: the manifest.

    Raises:
        CacheError: the group's document, whose other attributes are kept, is damaged.
        OSError: the operating system refuses.
    """
    write_group(path, manifest, metadata_documents(path, manifest)[GROUP_FILE])


def write_group(path: Path, manifest: Manifest, document: bytes) -> None:
    """Write both documents of a cache's group, the one that counts last.

    Killed in between, the second document may know of a source that nobody has written anything of.

    Args:
        path: folder of the cache, whose lock the caller holds.
        manifest: in the document; of format version 1, there is one document.
        document: its bytes.

    Raises:
        OSError: the operating system refuses.
    """
    if manifest.format_version > 1:
        write_file(path / GROUP_COPY, document, path)
    write_file(path / GROUP_FILE, document, path)


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
