"""Images matched by key to the rows of a cache whose latents were imported.

Another program encoded them, so the cache knows no image but by its key and label. Images that have both are
the rows'; then a teacher is added as to any other cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import CacheError
from ...data.format.columns import AUTOENCODER
from ...data.format.foreign import foreign_note
from ...data.format.manifest import IMAGES_NOTE, MIRRORED_AT_RANDOM
from ...data.format.opening import read_keys, read_labels
from ...data.format.survey import committed_shards
from ...data.units import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from ...data.format.manifest import Manifest
    from ...data.storage.bucket import CachePath
    from .base import ImageSource


class MatchedImages:
    """The images of a cache's rows, in its order, see `ImageSource`.

    Args:
        images: has an image of every row's key, and may have more.
        cache: the cache.
        manifest: its manifest.

    Attributes:
        matched_fingerprint: of ``images``, which the cache notes once a teacher is added.

    Raises:
        CacheError: an image is missing or of another class, rows were mirrored at random, or other images
            were matched before.
    """

    def __init__(self, images: ImageSource, cache: CachePath, manifest: Manifest) -> None:
        note = foreign_note(manifest)
        if note is not None and note.mirrored == MIRRORED_AT_RANDOM:
            raise CacheError(
                f"the images of cache {cache} were mirrored at random by {note.layout}, and nothing says "
                "which, so no image fits its rows",
                "encode the images with `repa preprocess` into another cache",
                field="--data",
            )
        self._images = images
        self.matched_fingerprint = images.fingerprint
        self.name, self.kind = images.name, manifest.source_kind
        self.fingerprint = manifest.source_fingerprint
        self.keys: Sequence[str] = read_keys(cache, manifest)
        self.labels: NDArray[np.int32] = read_labels(cache, manifest)
        self.class_names: Sequence[str] = manifest.class_names
        self.skipped: Sequence[tuple[str, str]] = images.skipped
        rows = {key: row for row, key in enumerate(images.keys)}
        missing = [key for key in self.keys if key not in rows]
        if missing:
            raise CacheError(
                f"{images.name} lacks {counted(len(missing), 'image', ',')} of the {len(self.keys):,} of "
                f"cache {cache}, the first is {missing[0]}",
                "give the images that its latents were made from, under these names; if those are no images' "
                "names, import again with --data",
                field="--data",
            )
        self._rows = np.array([rows[key] for key in self.keys], dtype=np.int64)
        wrong = np.flatnonzero(images.labels[self._rows] != self.labels)
        if len(wrong):
            row = int(wrong[0])
            raise CacheError(
                f"{images.name} has {self.keys[row]} in class {images.labels[self._rows[row]]}, cache "
                f"{cache} in class {self.labels[row]}, and {len(wrong) - 1:,} more differ",
                "give the images that its latents were made from, or other --labels",
                field="--labels",
            )
        self._check_bound(cache, manifest)
        more = len(images) - len(self.keys)
        left = (f"{counted(more, 'image', ',')} without latents in {cache} are left out",) if more else ()
        self.remarks: Sequence[str] = (*images.remarks, *left)

    def _check_bound(self, cache: CachePath, manifest: Manifest) -> None:
        before = manifest.sources[AUTOENCODER].notes.get(IMAGES_NOTE)
        if before in (None, self.matched_fingerprint) or not teachers_begun(cache, manifest):
            return
        raise CacheError(
            f"{self._images.name} is not what the teachers of cache {cache} were added from: it has other "
            "images, or the same in other sizes",
            "give those with --data",
            field="--data",
        )

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, index: int, /) -> Image.Image:
        """Return the image of row ``index`` as RGB, see `ImageSource.load`."""
        return self._images.load(int(self._rows[index]))


def teachers_begun(cache: CachePath, manifest: Manifest) -> bool:
    """Return whether a shard of any source but the latents is committed."""
    return any(
        committed_shards(cache, manifest, source) for source in manifest.sources if source != AUTOENCODER
    )
