"""The removal of a source from a cache, which is then as if it had never been added.

The manifest goes first, at once. From then on nothing of the source counts, and what is left of it is
removed; a drop that was killed is finished by the same call. A source that is declared again meanwhile
begins without the records that were left (`store.ensure_source`).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import CacheError, RepaError
from ..format.captions import captions_path, has_captions
from ..format.columns import AUTOENCODER, column_name, model_of, source_of
from ..format.layout import (
    CALIBRATION_FOLDER,
    COMMITS_FOLDER,
    GROUP_FILE,
    calibration_file,
    calibration_lock,
)
from ..format.opening import open_manifest
from ..storage.files import os_errors
from ..storage.writable import open_writable
from ..writing.store import cache_lock, write_manifest
from ..writing.valid_rows import settle_all_valid
from ..writing.writer import SourceWriter

if TYPE_CHECKING:
    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath


def drop_source(path: CachePath, source: str, *, autoencoder: bool = False) -> Manifest:
    """Remove a source's columns, commit records and calibration.

    Args:
        path: folder of the cache, or its prefix in a bucket.
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
    with ExitStack() as stack, os_errors("remove", path):
        if source in manifest.sources:
            # nobody is about to commit a shard of it
            stack.enter_context(SourceWriter(path, manifest, source, range(manifest.num_shards)))
        manifest = _take_out(path, source)
        settle_all_valid(path, manifest)
        _remove_left(path, source)
    return manifest


def _take_out(path: CachePath, source: str) -> Manifest:
    """Write the manifest without the source, if it has it."""
    with cache_lock(path) as locked:
        manifest = open_manifest(path)
        if source in manifest.sources:
            manifest = replace(
                manifest,
                columns={name: spec for name, spec in manifest.columns.items() if source_of(name) != source},
                sources={name: each for name, each in manifest.sources.items() if name != source},
            )
            write_manifest(path, manifest, locked)
        return manifest


def _remove_left(path: CachePath, source: str) -> None:
    """Remove what lies there of a source, unless another process has declared it again."""
    folder = open_writable(path)
    with cache_lock(path) as locked:
        manifest = open_manifest(path)
        if source in manifest.sources:
            return
        for leftover in _left_of(path, source, manifest):
            folder.remove_all(leftover, locked.held)
            locked.held.check()
            folder.remove([leftover])
        for each in (path / model_of(source), path / CALIBRATION_FOLDER):
            folder.remove_if_empty(each)  # what others have put there is theirs


def _left_of(path: CachePath, source: str, manifest: Manifest) -> list[CachePath]:
    """Return what of a source lies in the cache's folder, whether the manifest still has it or not."""
    folder, model = open_writable(path), model_of(source)
    alone = all(model_of(other) != model for other in manifest.sources if other != source)
    fitted = {calibration_file(path, source).name, calibration_lock(path, source).name}
    return [
        *(path / COMMITS_FOLDER / name for name in folder.names(path / COMMITS_FOLDER) if name == source),
        *(
            path / CALIBRATION_FOLDER / name
            for name in folder.names(path / CALIBRATION_FOLDER)
            if name in fitted
        ),
        *(
            path / model / name
            for name in folder.names(path / model)
            if _is_of(name, source) or (alone and name == GROUP_FILE)
        ),
    ]


def _is_of(kind: str, source: str) -> bool:
    try:
        return source_of(f"{model_of(source)}/{kind}") == source
    except RepaError:
        return False
