"""Noting of a cache with imported latents which images its teachers are added from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..format.columns import AUTOENCODER
from ..format.manifest import IMAGES_NOTE
from ..format.opening import open_manifest
from ..writing.store import cache_lock, write_manifest

if TYPE_CHECKING:
    from ..storage.bucket import CachePath


def settle_images(path: CachePath, fingerprint: str) -> None:
    """Note the fingerprint of the images, where it is not noted yet. Every process may do it, and again.

    Args:
        path: folder of the cache.
        fingerprint: of the images as they were listed.

    Raises:
        CacheError: the manifest is damaged.
        RepaError: the operating system refuses.
    """
    if open_manifest(path).sources[AUTOENCODER].notes.get(IMAGES_NOTE) == fingerprint:
        return
    with cache_lock(path) as group:
        manifest = open_manifest(path)
        known = manifest.sources[AUTOENCODER]
        noted = replace(known, notes={**known.notes, IMAGES_NOTE: fingerprint})
        noting = replace(manifest, sources={**manifest.sources, AUTOENCODER: noted})
        write_manifest(path, noting, group)
