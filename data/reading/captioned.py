"""The captions of images, drawn one an image and read as rows of the cache of captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import CacheError
from ..format.captions import NONE, captions_path, read_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath


class CaptionTable:
    """Which captions each image has.

    Args:
        path: of the cache of the images.
        images: its manifest.
        captions: manifest of its captions.

    Attributes:
        counts: captions of each image, at least one, int64 ``[N]``.

    Raises:
        CacheError: the table is missing, damaged, or of other images or captions.
        RepaError: it cannot be read.
    """

    def __init__(self, path: CachePath, images: Manifest, captions: Manifest) -> None:
        self._where = captions_path(path)
        self._table = read_table(path, images, captions)
        self.counts: NDArray[np.int64] = (self._table != NONE).sum(axis=1)

    def numbers(self, rows: NDArray[np.int64], words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Choose a caption of each image by a random word, evenly.

        Args:
            rows: of the images, int64 ``[B]``.
            words: random, uint64 ``[B]``.

        Returns:
            Which of an image's captions, from 0, int64 ``[B]``.
        """
        return (words % self.counts[rows].astype(np.uint64)).astype(np.int64)

    def rows_of(self, rows: NDArray[np.int64], numbers: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return the rows of captions, int64 ``[B]``.

        Args:
            rows: of the images, int64 ``[B]``.
            numbers: which caption of each, from 0, int64 ``[B]``; the first by default.

        Raises:
            CacheError: an image has fewer captions.
        """
        chosen = np.zeros_like(rows) if numbers is None else numbers
        outside = (chosen < 0) | (chosen >= self.counts[rows])
        if outside.any():
            row = int(rows[outside][0])
            raise CacheError(
                f"image {row} has {self.counts[row]} captions in {self._where}, and number "
                f"{chosen[outside][0]} was asked for",
                "count from 0",
            )
        return self._table[rows, chosen].astype(np.int64)
