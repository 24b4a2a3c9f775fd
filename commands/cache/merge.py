"""`repa cache merge` makes caches of parts of one image set the cache of the whole."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ...data.errors import CacheError, RepaError
from ...data.units import counted
from ...data.upkeep.parts import ImageSet, Part, joined_images
from .export import transfer_bar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from ...pipeline.images.folder import FolderImages


def merge(
    *,
    parts: Sequence[Path],
    cache: Path,
    data: str | None = None,
    sources: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Join caches. Nothing is encoded. The same command again resumes.

    Args:
        parts: folders of the caches.
        cache: folder of the whole.
        data: the images of the whole, which are listed, not decoded: with them the cache is the one that
            `repa preprocess` would have made of them at once, and teachers can be added to it.
        sources: what to join; all, by default.
        console: where to print; standard output by default.

    Raises:
        CacheError: parts that do not fit together or are not complete; images that are not theirs.
        RepaError: the disk is full, or refuses.
    """
    from rich.text import Text

    from ...data.units import human_bytes
    from ...data.upkeep.info import cache_info
    from ...data.upkeep.merge import merge_caches
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    opened = [Part.open(path) for path in parts]
    if not opened:
        raise RepaError("no cache to join", "name at least two")
    images = joined_images(opened) if data is None else _images_of(opened, data)
    with transfer_bar("joining", console, "rows") as progress:
        merge_caches(opened, cache, images, sources=sources or None, progress=progress)
    found = cache_info(cache)
    size = human_bytes(found.total_bytes)
    say = f"{cache}: {counted(found.num_rows, 'image')} of {counted(len(opened), 'cache')}, {size}"
    console.print(Text(say), soft_wrap=True)
    if data is None:
        note = (
            "its images were not looked at: it can be trained on, but for adding a teacher it would have to "
            "be joined with --data"
        )
        console.print(Text(note, style="yellow"), soft_wrap=True)


def _images_of(parts: Sequence[Part], data: str) -> ImageSet:
    """Open the image set that ``data`` names and hold each part against it.

    Raises:
        RepaError: the images cannot be listed.
        CacheError: they are of another kind, or a file has another size than when its part was made.
    """
    from ...pipeline.images.base import AUTO_LABELS, NO_LABELS, ONLY_CLASS
    from ...pipeline.images.folder import FolderImages
    from ...pipeline.images.open import open_source

    first = parts[0].manifest
    images = open_source(
        data,
        apply_exif=first.exif_orientation == "applied",
        labels=NO_LABELS if first.class_names == (ONLY_CLASS,) else AUTO_LABELS,
        may_import=True,
    )
    if images.kind != first.source_kind:
        raise CacheError(
            f"{data} is of kind {images.kind}, the parts were made from {first.source_kind}",
            "give the images they were made from",
        )
    if isinstance(images, FolderImages):
        for part in parts:
            _check_sizes(part, images)
    return ImageSet(
        fingerprint=images.fingerprint,
        keys=images.keys,
        labels=images.labels,
        class_names=tuple(images.class_names),
    )


def _check_sizes(part: Part, images: FolderImages) -> None:
    """Compare the files that a part was made from with those in the folder, by size."""
    from ...pipeline.images.listing import fingerprint_of

    known = frozenset(images.keys)
    root = os.path.join(images.root, "")
    if not known.issuperset(part.keys):
        return  # which one is missing, the joining itself says
    found = fingerprint_of(part.keys, part.labels, (os.stat(f"{root}{key}").st_size for key in part.keys))
    if found != part.manifest.source_fingerprint:
        raise CacheError(
            f"some of the images of cache {part.path} have another size in {images.root} than when it was "
            "made",
            "give the images it was made from, or encode that part again",
        )
