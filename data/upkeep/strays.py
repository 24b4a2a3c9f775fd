"""Finding the files below a cache that no part of it explains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..format.captions import CAPTIONS_FOLDER, SOURCE_KIND, TABLE, TABLE_CHUNK
from ..format.layout import (
    CALIBRATION_FOLDER,
    GROUP_COPY,
    GROUP_FILE,
    KEYS_FILE,
    LABEL_CHUNK,
    LOCK_FILE,
    VALID,
    calibration_file,
    calibration_lock,
    commit_file,
    commit_folder,
    shard_file,
    valid_chunk,
    zarr_documents,
)
from ..storage.bucket import RemotePath
from ..storage.files import os_errors, partial_path
from ..storage.leases import is_lease
from ..writing.calibrations import recorded_sha256
from .info import sizes_below
from .shard_check import Finding

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath


def check_strays(path: CachePath, manifest: Manifest, committed: Iterable[tuple[str, int]]) -> list[Finding]:
    """Find files that no part of the cache explains.

    Those of a shard that is not committed are a run's in progress.
    """
    done = set(committed)
    present = _names_of_files(path)
    root = Path()
    known: set[str] = {*zarr_documents(manifest), LOCK_FILE, KEYS_FILE, LABEL_CHUNK, GROUP_COPY}
    # an upgrade that was stopped has begun with them
    known.add(f"{VALID}/{GROUP_FILE}")
    known.update(str(valid_chunk(root, shard)) for shard in range(manifest.num_shards))
    for source in manifest.sources:
        known.add(str(commit_folder(root, source) / LOCK_FILE))
        for shard in range(manifest.num_shards):
            files = [
                shard_file(root, name, spec, shard) for name, spec in manifest.source_columns(source).items()
            ]
            files.append(commit_file(root, source, shard))
            known.update(map(str, files))
            if (source, shard) not in done:
                known.update(str(partial_path(file)) for file in files)
    known |= _known_calibrations(present, manifest, {source for source, _ in done})
    if manifest.source_kind == SOURCE_KIND:
        known |= {TABLE_CHUNK, f"{TABLE}/{GROUP_FILE}"}
    else:
        # they are a cache of their own, which is checked as one
        present = [name for name in present if not name.startswith(f"{CAPTIONS_FOLDER}/")]
    return [
        Finding(path=path / name, what=f"{path / name} is not the cache's", remedy="delete it")
        for name in present
        if name not in known and not is_lease(name)
    ]


def _names_of_files(path: CachePath) -> list[str]:
    """List every file below a folder or prefix, by its name within it, as sorted paths are."""
    with os_errors("read", path):
        if isinstance(path, RemotePath):
            sizes = sizes_below(path)
            # consoles mark a folder by an object of its name, without bytes
            folders = {parent for name in sizes for parent in map(str, Path(name).parents)}
            names = [name for name, size in sizes.items() if size or name not in folders]
        else:
            names = [
                os.path.relpath(os.path.join(folder, name), path)
                for folder, _, files in os.walk(path)
                for name in files
            ]
    return sorted(names, key=lambda name: name.split("/"))


def _known_calibrations(present: Iterable[str], manifest: Manifest, committed: Container[str]) -> set[str]:
    """List calibrations that notes speak of, and those of sources with no committed shard yet."""
    known = set()
    root = Path()
    # a calibration is made before its source is declared, and its lock before it
    locks = [Path(name) for name in present if Path(name).match(f"{CALIBRATION_FOLDER}/.?*{LOCK_FILE}")]
    begun = [lock.name[1:].removesuffix(LOCK_FILE) for lock in locks if len(lock.parts) == 2]
    for source in {*manifest.sources, *begun}:
        file = calibration_file(root, source)
        known.add(calibration_lock(root, source))
        if source in manifest.sources and recorded_sha256(manifest.sources[source]) is not None:
            known.add(file)
        if source not in committed:
            known |= {file, partial_path(file)}
    return set(map(str, known))
