"""The removal of a source from a cache, which is then as if it had never been added.

The manifest goes first, in one rename. From then on nothing of the source counts, and what is left of it is
removed; a drop that was killed is finished by the same call. A source that is declared again meanwhile
begins without the records that were left (`store.ensure_source`).
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import CacheError, RepaError
from ..format.captions import captions_path, has_captions
from ..format.columns import AUTOENCODER, column_name, model_of, source_of
from ..format.layout import (
    CALIBRATION_FOLDER,
    GROUP_FILE,
    calibration_file,
    calibration_lock,
    commit_folder,
)
from ..format.opening import open_manifest
from ..storage.files import os_errors, sync_folders
from ..writing.store import cache_lock, write_manifest
from ..writing.valid_rows import settle_valid
from ..writing.writer import SourceWriter

if TYPE_CHECKING:
    from pathlib import Path

    from ..format.manifest import Manifest
    from ..storage.folder import Seen


def drop_source(path: Path, source: str, *, autoencoder: bool = False) -> Manifest:
    """Remove a source's columns, commit records and calibration.

    Args:
        path: folder of the cache.
        source: name of the source, of its images or of its captions.
        autoencoder: whether the autoencoder's may be removed, without whose latents nothing is trained.

    Returns:
        The manifest without it, that of the captions if it was theirs.

    Raises:
        RepaError: that is no name of a source, or the operating system refuses.
        CacheError: there is no such source, it is the autoencoder's, or a process is writing it.
    """
    manifest = open_manifest(path)
    column_name(model_of(source), "cls")  # what is no name of a model is no path either
    if source not in manifest.sources and has_captions(path):
        where = captions_path(path)
        captions = open_manifest(where)
        if source in captions.sources or _left_of(where, source, captions):
            return drop_source(where, source)
    if source == AUTOENCODER and not autoencoder:
        raise CacheError(
            f"{AUTOENCODER} holds the latents of {path}, without which no run can use it",
            "say --autoencoder if that is meant",
            field="SOURCE",
        )
    if source not in manifest.sources and not _left_of(path, source, manifest):
        raise CacheError(
            f"cache {path} has no source {source}",
            f"it has {', '.join(manifest.sources) or 'none'}",
            field="SOURCE",
        )
    declared = manifest if source in manifest.sources else None
    if declared is not None:
        everything = SourceWriter(path, declared, source, range(declared.num_shards))
        with everything, cache_lock(path) as group:
            manifest = _drop(path, source, group)
    else:
        with cache_lock(path) as group:
            manifest = _drop(path, source, group)
    return manifest


def _drop(path: Path, source: str, seen: Seen) -> Manifest:
    """Do it, with the locks held."""
    with os_errors("remove", path):
        manifest = open_manifest(path)
        if source in manifest.sources:
            manifest = replace(
                manifest,
                columns={name: spec for name, spec in manifest.columns.items() if source_of(name) != source},
                sources={name: each for name, each in manifest.sources.items() if name != source},
            )
            write_manifest(path, manifest, seen)
        if manifest.format_version > 1:
            for shard in range(manifest.num_shards):
                settle_valid(path, manifest, shard)
        for leftover in _left_of(path, source, manifest):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
        for folder in (path / model_of(source), path / CALIBRATION_FOLDER):
            with suppress(OSError):  # what others have put there is theirs
                folder.rmdir()
        sync_folders(path, path)
    return manifest


def _left_of(path: Path, source: str, manifest: Manifest) -> list[Path]:
    """Return what of a source lies in the cache's folder, whether the manifest still has it or not."""
    model = model_of(source)
    paths = [commit_folder(path, source), calibration_file(path, source), calibration_lock(path, source)]
    with suppress(OSError):
        paths += [each for each in (path / model).iterdir() if _is_of(each.name, source)]
    if all(model_of(other) != model for other in manifest.sources if other != source):
        paths.append(path / model / GROUP_FILE)
    return [each for each in paths if each.is_symlink() or each.exists()]


def _is_of(kind: str, source: str) -> bool:
    try:
        return source_of(f"{model_of(source)}/{kind}") == source
    except RepaError:
        return False
