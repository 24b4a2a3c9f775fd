"""Giving the images of a cache their captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CacheError, RepaError
from ..format.captions import (
    EMPTY,
    MOST_CAPTIONS,
    NONE,
    TABLE_CHUNK,
    caption_keys,
    captions_manifest,
    captions_path,
    number_captions,
    read_record,
    read_table,
    table_documents,
)
from ..format.layout import KEYS_FILE
from ..format.opening import open_manifest, read_keys
from ..storage.files import os_errors
from ..storage.writable import open_writable
from .store import cache_lock, encode_keys, ensure_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..format.layout import PathT


def ensure_captions(
    path: PathT, captions: Sequence[Sequence[str]], record: Mapping[str, Any] | None = None
) -> PathT:
    """Give the images of a cache their captions, or check that they have these.

    Args:
        path: folder of the cache, which is there.
        captions: of each image, in the order of the rows; an image without any has the empty one.
        record: where they come from and what was left out, noted with the array of the images' captions.

    Returns:
        Folder of the captions, a cache itself, for text encoders to write to.

    Raises:
        CacheError: there is no cache, or its images have other captions.
        RepaError: an image has too many, or the operating system refuses.
    """
    images = open_manifest(path)
    if len(captions) != images.num_rows:
        raise ValueError(f"captions of {len(captions)} images do not fit {images.num_rows}")
    texts, table = number_captions(captions)
    if table.shape[1] > MOST_CAPTIONS:
        row = int((table != NONE).sum(axis=1).argmax())
        raise RepaError(
            f"image {row} of {path} has {len(captions[row])} captions",
            f"keep at most {MOST_CAPTIONS} of each with --captions-per-image",
            field="--captions",
        )
    where = captions_path(path)
    manifest = captions_manifest(images, texts, table)
    try:
        ensure_cache(where, manifest, caption_keys(texts), np.full(len(texts), EMPTY, np.int32))
    except CacheError as error:
        raise CacheError(
            f"the images of {path} have other captions: {error.what}",
            f"give the same --captions and --captions-per-image as before, or none, or delete {where}",
            field="--captions",
        ) from error
    files = {KEYS_FILE: encode_keys(caption_keys(texts)), **table_documents(table, record)}
    folder = open_writable(where)
    with cache_lock(where) as locked, os_errors("write", where):
        # the table comes last, so that one that is not there was left by a process that was killed; what is
        # damaged is known to be of these captions, as the fingerprint is theirs
        if not _sound(lambda: read_keys(where, manifest)):
            locked.held.check()
            folder.put(where / KEYS_FILE, files[KEYS_FILE])
        if not _sound(lambda: (read_record(path), read_table(path, images, manifest))):
            for name in files.keys() - {KEYS_FILE, TABLE_CHUNK}:
                locked.held.check()
                folder.put(where / name, files[name])
            locked.held.check()
            folder.put(where / TABLE_CHUNK, files[TABLE_CHUNK])
            folder.settle()
    read_table(path, images, manifest)
    return where


def _sound(read: Callable[[], object]) -> bool:
    """Return whether what is read is there and as it was written."""
    try:
        read()
    except CacheError:
        return False
    return True
