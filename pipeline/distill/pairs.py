"""The images of a cache with the tokens that its teacher gave for them. They are what is distilled from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...data.errors import CacheError
from ...data.format.columns import column_name, scale_column
from ...data.machine import usable_cores
from ...data.reading.reader import CacheReader
from ..columns.forms import restore
from ..images.views import check_views, in_view
from ..images.workers import decode_row
from ..replay.images import images_of
from ..replay.live import MAX_DECODERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.format.manifest import Manifest
    from ...data.storage.bucket import CachePath

KINDS = ("patch", "cls")


@dataclass(frozen=True)
class Pairs:
    """Some images and their tokens.

    Attributes:
        images: uint8 ``[B, 3, R, R]``.
        patch: float32 ``[B, T, D]``.
        cls: float32 ``[B, D]``.
    """

    images: Tensor
    patch: Tensor
    cls: Tensor


class CachedPairs:
    """Reads images of a cache beside one teacher's tokens, row by row and view by view.

    Args:
        cache: the cache.
        manifest: its manifest.
        teacher: name of the teacher.
        data: the images that it was made from, see `open_source`.
        device: where tensors go.
        may_import: whether ``data`` may name a module.

    Attributes:
        reader: of the teacher's tokens.

    Raises:
        RepaError: the images cannot be listed.
        CacheError: these are other images, or the teacher's tokens are not complete.
    """

    def __init__(
        self,
        cache: CachePath,
        manifest: Manifest,
        teacher: str,
        *,
        data: str,
        device: torch.device,
        may_import: bool = False,
    ) -> None:
        check_views(manifest.views, cache)
        self._cache, self._manifest, self._teacher, self._device = cache, manifest, teacher, device
        self._images = images_of(manifest, data, cache, may_import=may_import)
        own = [column_name(teacher, kind) for kind in KINDS]
        scales = [name for name in map(scale_column, own) if name in manifest.columns]
        self._columns = (*own, *scales)
        self.reader = CacheReader(cache, self._columns)
        self._pool = ThreadPoolExecutor(min(MAX_DECODERS, usable_cores()), "repa-decode")

    def __enter__(self) -> CachedPairs:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.reader.close()

    def read(self, rows: NDArray[np.int64], views: NDArray[np.int64] | None = None) -> Pairs:
        """Return some valid rows, in the order asked for.

        Args:
            rows: int64 ``[B]``.
            views: view of each, int64 ``[B]``; the first by default.

        Raises:
            CacheError: an image cannot be decoded any more, or a row is damaged.
        """
        seen = np.zeros(len(rows), np.int64) if views is None else views
        size = self._manifest.resolution
        decoded = self._pool.map(lambda row: decode_row(self._images, int(row), size), rows)
        images = []
        for row, view, pixels in zip(rows.tolist(), seen.tolist(), decoded, strict=True):
            if isinstance(pixels, str):
                raise CacheError(
                    f"image {self._images.keys[row]} of {self._images.name}, row {row} of cache "
                    f"{self._cache}, cannot be decoded any more ({pixels})",
                    "restore the image",
                    field="--data",
                )
            images.append(in_view(torch.from_numpy(pixels), self._manifest.views[view]))
        stored: dict[str, Tensor] = {}
        for name in self._columns:
            spec = self._manifest.columns[name]
            array = np.empty((len(rows), *spec.shape), dtype=spec.numpy_dtype)
            self.reader.read_rows(rows, (name,), {name: array}, views=seen)
            stored[name] = torch.from_numpy(array).to(self._device)
        patch, cls = (restore(self._teacher, kind, stored) for kind in KINDS)
        return Pairs(torch.stack(images).to(self._device), patch, cls)

    def batches(self, rows: NDArray[np.int64], size: int) -> Iterator[Pairs]:
        """Yield rows in their order and first view, so many at once."""
        for start in range(0, len(rows), size):
            yield self.read(rows[start : start + size])
