"""MAR's cached moments: ``<class>/<image file>.npz`` with ``moments`` and ``moments_flip``.

Facts (github.com/LTH14/mar, main_cache.py, engine_mar.py, models/vae.py): float32 ``[32, 16, 16]`` at 256²,
mean and then *log variance* of the KL-16 autoencoder, of the image and of the mirrored image; log variances
are clamped to [−30, 20] before use, and a draw is multiplied by 0.2325 in training. The path is the image's
last two parts; classes are numbered by sorted folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import RepaError
from ...data.format.manifest import MIRRORED_VIEW, ORIGINAL_VIEW
from ...data.reading.latents import LatentScale
from .arrays import MOST_BYTES, checked_numbers, parse_npz
from .base import FilePerRow, ForeignOptions, chosen_scale, image_shape
from .places import open_place

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_ENDING = ".npz"
_ARRAYS = ("moments", "moments_flip")
_LOG_VARIANCES = (-30.0, 20.0)


class Mar(FilePerRow):
    """Moments as MAR caches them, both views of every image.

    Args:
        root: the folder of class folders, or a ZIP file of it.
        options: of the command.

    Raises:
        RepaError: there are none, or a file does not lie or is not made as MAR's are.
    """

    layout = "mar"
    latents = "posterior"
    mirrored = "second view"
    views = (ORIGINAL_VIEW, MIRRORED_VIEW)
    factor = 16

    def __init__(self, root: Path, options: ForeignOptions) -> None:
        self.place = open_place(root)
        rows = [name for name in self.place.sizes if name.endswith(_ENDING)]
        astray = next((name for name in rows if name.count("/") != 1), None)
        if not rows or astray is not None:
            what = f"{self.where(astray)} does not lie in" if astray else f"{root} has no .npz files in"
            raise RepaError(
                f"{what} folders of classes, as n01440764/n01440764_10026.JPEG.npz",
                "name the folder that MAR's --cached_path named",
                field="FROM",
            )
        others = len(self.place.sizes) - len(rows)
        self.remarks = (f"{others} other files in {root} were not read",) if others else ()
        self.files = tuple(rows)
        self.settle_rows(rows)
        self.keys = [name.removesuffix(_ENDING) for name in rows]
        classes = [name.partition("/")[0] for name in rows]
        self.class_names = tuple(sorted(set(classes)))
        number = {name: label for label, name in enumerate(self.class_names)}
        self.labels = np.array([number[each] for each in classes], dtype=np.int32)
        first = self.where(rows[0])
        moments, _ = parse_npz(self.place.read(rows[0], MOST_BYTES), _ARRAYS, first)
        self.shape = image_shape(moments, first, even=True)
        self.scale = chosen_scale(LatentScale(0.2325), options)

    def decode(self, raw: bytes, where: str) -> NDArray[np.float32]:
        """Return the moments of both views in a file, see `FilePerRow.decode`."""
        views = zip(_ARRAYS, parse_npz(raw, _ARRAYS, where), strict=True)
        return np.stack([self._view(array, f"{name} in {where}") for name, array in views])

    def _view(self, array: NDArray[Any], where: str) -> NDArray[np.float32]:
        numbers = checked_numbers(array, self.shape, where)
        half = self.shape[0] // 2
        # in float64, and rounded once: other libraries' float32 exponentials differ in the last bit
        variances = np.clip(numbers[half:].astype(np.float64), *_LOG_VARIANCES)
        return np.concatenate([numbers[:half], np.exp(0.5 * variances).astype(np.float32)])


def open_latents(root: Path, options: ForeignOptions) -> Mar:
    """Return the latents of MAR's layout, see `Mar`."""
    return Mar(root, options)
