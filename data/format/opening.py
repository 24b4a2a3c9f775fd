"""The opening of a cache, which reads manifest, keys and labels and checks how they bind each other.

A reader needs no more than this and the commit records.
"""

from __future__ import annotations

import errno
import hashlib
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c

from ..errors import CacheError
from ..storage.bucket import file_bytes
from ..storage.files import os_errors, read_file
from ..storage.local import CHECKSUM_BYTES
from ..units import counted
from .columns import LABEL
from .group import read_group
from .layout import KEYS_FILE, LABEL_CHUNK
from .manifest import ATTRIBUTE, LOADED_NOTE, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from ..storage.bucket import CachePath
    from .columns import ColumnSpec
    from .manifest import Provenance

_SHOWN = 60  # characters of a value in an error
_RESTORE = "restore it, or have it written again by `repa cache repair`"
_MOST_KEY = 4096 * 2  # bytes of a line of keys.txt: longer than any path
_UNPROVED_ROWS = 2**16


def open_manifest(path: CachePath) -> Manifest:
    """Read the manifest of the cache at ``path``.

    Raises:
        CacheError: there is no cache, it is of another format version, or its manifest is damaged.
        RepaError: the operating system refuses.
    """
    manifest = Manifest.from_json(read_group(path)["attributes"][ATTRIBUTE], where=str(path))
    if manifest.num_rows > _UNPROVED_ROWS:
        _check_rows(path, manifest)
    return manifest


def _check_rows(path: CachePath, manifest: Manifest) -> None:
    """Check that a cache is as large as it says, before anything is made in that size.

    Keys or labels alone prove it: a cache that has lost one of them can be repaired.

    Raises:
        CacheError: neither has as many bytes as so many rows need.
    """
    found = {KEYS_FILE: 0, LABEL_CHUNK: 0}
    for name in found:
        with os_errors("read", path / name), suppress(FileNotFoundError):
            found[name] = file_bytes(path / name)
    if manifest.num_rows > max(found[KEYS_FILE], found[LABEL_CHUNK] // 4):
        raise CacheError(
            f"the manifest of {path} has {manifest.num_rows:,} rows, and neither {KEYS_FILE} nor the labels "
            "have as many",
            _RESTORE,
            field="num_rows",
        )


def read_keys(path: CachePath, manifest: Manifest) -> list[str]:
    """Image key of every row.

    Raises:
        CacheError: ``keys.txt`` is missing or not the one of the manifest.
    """
    data = _read(path / KEYS_FILE, _MOST_KEY * manifest.num_rows)
    if hashlib.sha256(data).hexdigest() != manifest.keys_sha256:
        raise CacheError(
            f"{path / KEYS_FILE} does not match its checksum in the manifest",
            _RESTORE,
        )
    try:
        keys = data.decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise CacheError(f"{path / KEYS_FILE} is not UTF-8 ({error})", _RESTORE) from error
    if len(keys) != manifest.num_rows:
        raise CacheError(
            f"{path / KEYS_FILE} has {counted(len(keys), 'key')} for {counted(manifest.num_rows, 'row')}",
            _RESTORE,
            field="keys_sha256",
        )
    return keys


def read_labels(path: CachePath, manifest: Manifest) -> NDArray[np.int32]:
    """Read the label of every row, int32 ``[N]``.

    Raises:
        CacheError: the label array is missing, cut off, does not match its checksum, or is another cache's.
    """
    file = path / LABEL_CHUNK
    data = _read(file, 4 * manifest.num_rows + CHECKSUM_BYTES)
    values, stored = data[:-CHECKSUM_BYTES], int.from_bytes(data[-CHECKSUM_BYTES:], "little")
    if len(values) != 4 * manifest.num_rows or crc32c(values) != stored:
        raise CacheError(
            f"{file} does not match its checksum",
            _RESTORE,
        )
    labels = np.frombuffer(values, dtype="<i4").astype(np.int32)
    if manifest.labels_sha256 not in ("", labels_sha256(labels)):
        raise CacheError(f"{file} holds other labels than the manifest is of", _RESTORE, field=LABEL)
    return labels


def labels_sha256(labels: NDArray[np.int32]) -> str:
    """Return the manifest's ``labels_sha256`` of labels int32 ``[N]``."""
    return hashlib.sha256(labels.astype("<i4", copy=False).tobytes()).hexdigest()


def declaration(provenance: Provenance, columns: Mapping[str, ColumnSpec]) -> dict[str, Any]:
    """Return what binds of a source.

    Notes and columns stand each for itself, so that the one that differs is named.
    """
    values = provenance.identity()
    notes = values.pop("notes")
    # a model's folder may be moved: the weights' hash says whether it is the same
    values.update({f"notes.{name}": value for name, value in notes.items() if name != "location"})
    for name, spec in columns.items():
        compressed = f" in {spec.compressor}" if spec.compressor else ""
        values[f"columns.{name}"] = f"{spec.dtype}{list(spec.shape)}{compressed}"
    return values


def as_recorded(found: Provenance, recorded: Iterable[Provenance]) -> Provenance:
    """Return a model's provenance with the kind of weights hash that a cache has of it.

    Until format version 2 ``weights_sha256`` was of the tensors as they are run, a position table resampled
    to the input size among them, so that one file had another hash at every size. Where a cache has the one
    that this model has by that count, it is the same model.

    Args:
        found: of the model at hand.
        recorded: of the cache's sources that came from a model of that name.
    """
    loaded = found.notes.get(LOADED_NOTE)
    if loaded is None or not any(each.weights_sha256 == loaded for each in recorded):
        return found
    notes = {name: value for name, value in found.notes.items() if name != LOADED_NOTE}
    return replace(found, weights_sha256=loaded, notes=notes)


def differences(here: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Say ``field is a, not b`` of every field that differs. Values that are long are left out."""
    parts = []
    for key in dict.fromkeys([*here, *wanted]):
        if here.get(key) != wanted.get(key):
            a, b = str(here.get(key)), str(wanted.get(key))
            long = len(a) > _SHOWN or len(b) > _SHOWN
            parts.append(f"{key} differs" if long else f"{key} is {a}, not {b}")
    return ", ".join(parts)


def _read(file: CachePath, most_bytes: int) -> bytes:
    with os_errors("read", file):
        try:
            return read_file(file, most_bytes)
        except FileNotFoundError as error:
            raise CacheError(f"{file} is missing", _RESTORE) from error
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            raise CacheError(f"{file} does not match its checksum, {error.strerror}", _RESTORE) from error
