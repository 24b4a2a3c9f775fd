"""fast-DiT's features: ``imagenet256_features/0.npy`` and ``imagenet256_labels/0.npy``.

Facts (github.com/chuanyangjin/fast-DiT, extract_features.py and train.py): ``[1, 4, 32, 32]`` float32 at
256², one *draw* from the posterior of an SD-VAE, multiplied by 0.18215 already; labels int64 ``[1]``. Each
image was mirrored or not by a coin that is not kept. One process writes number i of the sorted image folder;
several would write over one another's files.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import RepaError
from ...data.reading.latents import STABLE_DIFFUSION_SCALE
from ...data.units import counted
from ..images.listing import class_names_of
from .arrays import AGAIN, MOST_BYTES, checked_numbers, parse_npy
from .base import FilePerRow, ForeignOptions, chosen_scale, image_shape, moments_of_draw
from .places import open_place

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_FILE = re.compile(r"([^/]+)_(features|labels)/(\d{1,10})\.npy")


class FastDit(FilePerRow):
    """Features as fast-DiT extracts them.

    Args:
        root: the folder that has ``…_features`` and ``…_labels``, or a ZIP file of it.
        options: of the command.

    Raises:
        RepaError: there are none, a file is not named or made as fast-DiT's are, or has no counterpart.
    """

    layout = "fast-dit"
    latents = "sampled"
    mirrored = "at random"
    factor = 8

    def __init__(self, root: Path, options: ForeignOptions) -> None:
        self.place = open_place(root)
        found: dict[str, dict[int, str]] = {"features": {}, "labels": {}}
        sets = set()
        for name in self.place.sizes:
            match = _FILE.fullmatch(name)
            if match is None or str(int(match[3])) != match[3]:
                raise RepaError(
                    f"{self.where(name)} is not named as fast-DiT's files are, as imagenet256_features/0.npy",
                    "name the folder that has imagenet256_features and imagenet256_labels, and nothing else",
                    field="FROM",
                )
            sets.add(match[1])
            found[match[2]][int(match[3])] = name
        features, labels = found["features"], found["labels"]
        if len(sets) != 1 or not features:
            what = "has no features" if not features else f"has the features of {counted(len(sets), 'set')}"
            raise RepaError(
                f"{root} {what}",
                "name the folder that has imagenet256_features and imagenet256_labels, and nothing else",
                field="FROM",
            )
        if alone := sorted(features.keys() ^ labels.keys()):
            has, lacks = ("features", "label") if alone[0] in features else ("label", "features")
            raise RepaError(
                f"number {alone[0]} of {root} has a file of {has} and none of its {lacks}, and "
                f"{len(alone) - 1} more are alone",
                AGAIN,
                field="FROM",
            )
        numbers = sorted(features)
        self.files = tuple(self.place.sizes)
        self.settle_rows([features[number] for number in numbers])
        self.keys = self.rows
        values = np.array([self._label(labels[number]) for number in numbers], dtype=np.int64)
        self.class_names = class_names_of(values, None, where=str(root))
        self.labels = values.astype(np.int32)
        self.scale = chosen_scale(STABLE_DIFFUSION_SCALE, options)
        first = self.where(self.rows[0])
        array = self._image(parse_npy(self.place.read(self.rows[0], MOST_BYTES), first), first)
        channels, *sides = image_shape(array, first, even=False)
        self.shape = (2 * channels, sides[0], sides[1])
        self.remarks = (
            "these images were mirrored at random, and nothing says which: teachers cannot be added",
        )

    def _label(self, name: str) -> int:
        where = self.where(name)
        array = parse_npy(self.place.read(name, MOST_BYTES), where)
        if array.shape != (1,) or array.dtype.kind not in "iu" or not 0 <= int(array[0]) < 2**31:
            raise RepaError(f"{where} is no label, int64 [1] from 0", AGAIN)
        return int(array[0])

    def _image(self, array: NDArray[Any], where: str) -> NDArray[Any]:
        if array.ndim != 4 or len(array) != 1:
            raise RepaError(
                f"{where} has the shape {list(array.shape)}, and features are [1, channels, side, side]",
                "name the folder that fast-DiT's --feature-path named",
            )
        image: NDArray[Any] = array[0]
        return image

    def decode(self, raw: bytes, where: str) -> NDArray[np.float32]:
        """Return the unscaled draw in a file as moments, see `FilePerRow.decode`."""
        channels, *sides = self.shape
        image = self._image(parse_npy(raw, where), where)
        scaled = checked_numbers(image, (channels // 2, *sides), where).astype(np.float64)
        latent = scaled / self.scale.scaling_factor + self.scale.shift_factor
        return moments_of_draw(latent)[None]


def open_latents(root: Path, options: ForeignOptions) -> FastDit:
    """Return the latents of fast-DiT's layout, see `FastDit`."""
    return FastDit(root, options)
