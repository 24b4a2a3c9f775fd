"""Encode an image set once, then train every representation-alignment method from the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from .opened import OpenedCache

__version__ = "0.1.0"


def open(cache: str | PathLike[str]) -> OpenedCache:
    """Open a cache to read its rows, or to train from it in a loop of your own.

    It needs no PyTorch before tensors are asked for.

    Args:
        cache: its folder, or its address in a bucket, ``s3://…`` or ``gs://…``.

    Raises:
        CacheError: there is none, or its manifest is damaged.
        RepaError: it is an export in tars, or the operating system refuses.
    """
    from .opened import OpenedCache

    return OpenedCache(cache)
