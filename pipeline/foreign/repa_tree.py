"""The tree of REPA's preprocessing: ``vae-sd/00000/img-mean-std-00000000.npy`` and ``dataset.json``.

Facts (github.com/sihyun-yu/REPA, preprocessing/dataset_tools.py and dataset.py): one float32 array a file,
``[8, 32, 32]`` at 256², posterior mean and standard deviation of an SD-VAE that saw pixels in [−1, 1],
unscaled. The number is that of the image in the sorted list; ``convert`` names image i
``00000/img00000000.png``. A draw is multiplied by 0.18215 in training. No view is mirrored.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import RepaError
from ...data.reading.latents import STABLE_DIFFUSION_SCALE
from ..images.base import ONLY_CLASS
from ..images.dataset_json import DATASET_JSON, labels_of, parse_dataset_json
from ..images.listing import class_names_of
from .arrays import MOST_BYTES, checked_numbers, parse_npy
from .base import FilePerRow, ForeignOptions, chosen_scale, image_shape
from .places import open_place

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_FOLDER = "vae-sd"
_NAME = re.compile(r"(\d{5})/img-mean-std-(\d{8})\.npy")
_MOST_JSON = 1 << 30


class RepaTree(FilePerRow):
    """Moments of REPA's tree.

    Args:
        root: the tree, its folder ``vae-sd``, or a ZIP file of that.
        options: of the command.

    Raises:
        RepaError: there are none, a file is not named or made as REPA's are, or labels are missing.
    """

    layout = "repa"
    latents = "posterior"
    factor = 8

    def __init__(self, root: Path, options: ForeignOptions) -> None:
        inner = root / _FOLDER
        zipped = root / f"{_FOLDER}.zip"
        self.place = open_place(inner if inner.is_dir() else zipped if zipped.is_file() else root)
        rows = []
        for name in self.place.sizes:
            found = _NAME.fullmatch(name)
            if found and found[1] == found[2][:5]:
                rows.append(name)
            elif name != DATASET_JSON:
                raise RepaError(
                    f"{self.where(name)} is not named as moments of REPA's tree, as "
                    "00000/img-mean-std-00000000.npy",
                    "name the folder that has them and dataset.json, and nothing else",
                    field="FROM",
                )
        if not rows or DATASET_JSON not in self.place.sizes:
            lacks = DATASET_JSON if rows else "moments, as 00000/img-mean-std-00000000.npy"
            raise RepaError(f"{self.place.name} has no {lacks}", "name REPA's tree", field="FROM")
        self.files = tuple(self.place.sizes)
        self.settle_rows(rows)
        self.keys = [name.replace("img-mean-std-", "img").removesuffix(".npy") + ".png" for name in rows]
        self._label()
        first = self.where(rows[0])
        self.shape = image_shape(parse_npy(self.place.read(rows[0], MOST_BYTES), first), first, even=True)
        self.scale = chosen_scale(STABLE_DIFFUSION_SCALE, options)

    def _label(self) -> None:
        where = self.where(DATASET_JSON)
        found = parse_dataset_json(self.place.read(DATASET_JSON, _MOST_JSON), where)
        if found is None:
            raise RepaError(f"{where} has no labels", "write it again by REPA's dataset_tools", field="FROM")
        if found.labels is None:
            self.labels = np.zeros(len(self.rows), dtype=np.int32)
            self.class_names = (ONLY_CLASS,)
            return
        labels, self.remarks = labels_of(found, self.rows, where)
        self.class_names = class_names_of(labels, None, where=where)
        self.labels = labels.astype(np.int32)

    def decode(self, raw: bytes, where: str) -> NDArray[np.float32]:
        """Return the moments in a file, see `FilePerRow.decode`."""
        moments = checked_numbers(parse_npy(raw, where), self.shape, where)
        if moments[self.shape[0] // 2 :].min() < 0:
            raise RepaError(
                f"{where} holds a negative standard deviation in the second half of its channels",
                "look whether these are mean and deviation: of log variances this layout is not",
            )
        return moments[None]


def open_latents(root: Path, options: ForeignOptions) -> RepaTree:
    """Return the latents of REPA's tree, see `RepaTree`."""
    return RepaTree(root, options)
