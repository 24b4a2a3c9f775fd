"""What methods advise where the cache lacks a teacher's columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.format.columns import AUTOENCODER
from ...data.format.manifest import takes_teachers

if TYPE_CHECKING:
    from collections.abc import Mapping


def teacher_added(what: str, flags: str, notes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how a teacher's columns come into this cache, or into another where this one takes none.

    Args:
        what: is added, ``it`` or ``them``.
        flags: of `repa preprocess`.
        notes: source → what its provenance notes.
    """
    if takes_teachers(notes.get(AUTOENCODER, {})):
        return f"add {what} with `repa preprocess {flags}` on this cache"
    return (
        f"encode the images into another cache with `repa preprocess {flags} --cache FOLDER`: these imported "
        "latents were mirrored at random, and nothing says which"
    )
