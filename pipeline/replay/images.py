"""The images of a cache, found again as it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import CacheError
from ...data.format.foreign import foreign_note
from ...data.units import counted
from ...data.writing.store import keys_sha256
from ..images.base import AUTO_LABELS, FOLDER_LABELS, NO_LABELS, ONLY_CLASS
from ..images.matched import MatchedImages
from ..images.open import open_source

if TYPE_CHECKING:
    from ...data.format.manifest import Manifest
    from ...data.storage.bucket import CachePath
    from ..images.base import ImageSource

# kinds of sources that may have labels of two sorts
_FOLDERS = ("folder", "zip")


def images_of(manifest: Manifest, data: str, cache: CachePath, *, may_import: bool = False) -> ImageSource:
    """Open the images of a cache as it was written.

    Args:
        manifest: of the cache.
        data: what is said to be its images, see `open_source`.
        cache: the cache, for the error.
        may_import: see `open_source`.

    Raises:
        RepaError: the folder cannot be listed.
        CacheError: these are other images.
    """
    if foreign_note(manifest) is not None:
        return _open_matched(manifest, data, cache, may_import)
    images = _open_as_recorded(manifest, data, may_import)
    if keys_sha256(images.keys) != manifest.keys_sha256:
        what = f"{counted(len(images), 'image', ',')} under other names than its {manifest.num_rows:,}"
    elif images.fingerprint != manifest.source_fingerprint:
        what = "images of the same names, but of other classes or sizes in bytes"
    else:
        return images
    raise CacheError(
        f"{data} is not what cache {cache} was made from: it has {what}",
        "give that folder with --data",
        field="--data",
    )


def _open_as_recorded(manifest: Manifest, data: str, may_import: bool) -> ImageSource:
    """Open the images with labels from where the cache has its own, which no manifest says."""
    only = manifest.class_names == (ONLY_CLASS,)
    for labels in (NO_LABELS,) if only else (AUTO_LABELS, FOLDER_LABELS):
        images = open_source(
            data,
            limit=manifest.num_rows,
            apply_exif=manifest.exif_orientation == "applied",
            labels=labels,
            may_import=may_import,
        )
        other = images.fingerprint != manifest.source_fingerprint
        if not (other and images.kind in _FOLDERS and keys_sha256(images.keys) == manifest.keys_sha256):
            break
    return images


def _open_matched(manifest: Manifest, data: str, cache: CachePath, may_import: bool) -> ImageSource:
    """Open the images of imported latents, with labels from where the cache has its own."""
    apply_exif = manifest.exif_orientation == "applied"
    only = manifest.class_names == (ONLY_CLASS,)
    for labels in (NO_LABELS,) if only else (AUTO_LABELS, FOLDER_LABELS):
        images = open_source(data, apply_exif=apply_exif, labels=labels, may_import=may_import)
        try:
            return MatchedImages(images, cache, manifest)
        except CacheError as error:
            if error.field != "--labels" or labels != AUTO_LABELS or images.kind not in _FOLDERS:
                raise
    raise AssertionError("the last of them returns or raises")
