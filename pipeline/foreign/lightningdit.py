"""LightningDiT's latents, ``latents_rank00_shard000.safetensors`` with both views and labels.

Facts (github.com/hustvl/LightningDiT, extract_features.py and datasets/img_latent_dataset.py): ``latents``
and ``latents_flip`` ``[n, C, h, w]``, ``[32, 16, 16]`` an image of VA-VAE at 256², one *draw* from the
posterior, unscaled, of the image and of the mirrored image; ``labels`` int64 ``[n]``. Rank r of W has images
r, r + W, … of the sorted image folder, in order over its shards, and the first images again at the end where
W does not divide their number. Training takes (z − mean)·factor / std with ``mean`` and ``std`` of
``latents_stats.pt``, factor 1 for VA-VAE. No file says which image a row is of: where images are given, their
order and labels do.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...data.edge import printable
from ...data.errors import RepaError
from ...data.format.manifest import MIRRORED_VIEW, ORIGINAL_VIEW
from ...data.reading.latents import LatentScale
from ...data.storage.files import os_errors
from ...data.storage.regular import open_regular
from ...data.units import counted
from ..images.listing import class_names_of
from .arrays import AGAIN, MOST_BYTES
from .base import ForeignLatents, ForeignOptions, chosen_scale, moments_of_draw
from .places import FolderPlace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..images.base import ImageSource

_FILE = re.compile(r"latents_rank(\d{2,6})_shard(\d{3,6})\.safetensors")
_STATISTICS = "latents_stats.pt"
_VIEWS = ("latents", "latents_flip")
_LABELS = "labels"
_FLOATS = ("F32", "F16", "BF16")
_MOST_ROWS = 1 << 20  # of one file; the program writes 10,000
_MOST_OPEN = 256
_AT_ONCE = 64
_STATISTICS_BYTES = 1 << 20


class LightningDit(ForeignLatents):
    """Latents as LightningDiT extracts them, both views of every image.

    Args:
        root: the folder of the files.
        options: of the command.

    Raises:
        RepaError: files are missing, damaged or of different kinds, or are not of the images given.
    """

    layout = "lightningdit"
    latents = "sampled"
    mirrored = "second view"
    views = (ORIGINAL_VIEW, MIRRORED_VIEW)

    def __init__(self, root: Path, options: ForeignOptions) -> None:
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise RepaError(f"{root} {what}", "name the folder of the safetensors files", field="FROM")
        self._folder = FolderPlace(root)
        self.place = self._folder
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        ranks = self._ranks()
        counts = {name: self._check_header(name) for shards in ranks for name in shards}
        self.files = tuple(sorted(counts))
        self._where_rows_are(ranks, counts)
        self._statistics(options)
        self._name_rows(options)
        # VA-VAE's f16d32, and Stable Diffusion's autoencoder by its four channels
        self.factor = 8 if self.shape[0] == 8 else 16

    def _ranks(self) -> list[list[str]]:
        """Return the files of each rank, in order."""
        found: dict[int, dict[int, str]] = {}
        for name in self.place.sizes:
            match = _FILE.fullmatch(name)
            if match is not None:
                found.setdefault(int(match[1]), {})[int(match[2])] = name
            elif name.endswith(".safetensors"):
                raise RepaError(
                    f"{self.place.name}/{name} is not named as LightningDiT's files are, as "
                    "latents_rank00_shard000.safetensors",
                    "move it away",
                    field="FROM",
                )
        if not found:
            raise RepaError(
                f"{self.place.name} has no latents_rank00_shard000.safetensors",
                "name the folder that extract_features wrote",
                field="FROM",
            )
        for rank in range(max(found) + 1):
            shards = found.get(rank, {})
            lacking = next((n for n in range(max(shards, default=0) + 1) if n not in shards), None)
            if lacking is not None:
                raise RepaError(
                    f"{self.place.name} lacks latents_rank{rank:02d}_shard{lacking:03d}.safetensors",
                    "bring it: the rows of the others are told by their place among all",
                    field="FROM",
                )
        return [[found[rank][shard] for shard in sorted(found[rank])] for rank in sorted(found)]

    def _check_header(self, name: str) -> int:
        """Return the rows of a file whose header is as the layout says."""
        where = f"{self.place.name}/{name}"
        file = self._file(name)
        names = set(file.keys())
        missing = [each for each in (*_VIEWS, _LABELS) if each not in names]
        if missing:
            raise RepaError(f"{where} has no {missing[0]}", AGAIN, field=missing[0])
        shapes = {each: tuple(file.get_slice(each).get_shape()) for each in (*_VIEWS, _LABELS)}
        dtypes = {each: str(file.get_slice(each).get_dtype()) for each in (*_VIEWS, _LABELS)}
        rows, *image = shapes[_VIEWS[0]] or (0,)
        fits = len(image) == 3 and image[1] == image[2] and shapes[_VIEWS[1]] == shapes[_VIEWS[0]]
        if not fits or shapes[_LABELS] != (rows,) or not 0 < rows <= _MOST_ROWS:
            said = ", ".join(f"{each} {list(shape)}" for each, shape in shapes.items())
            raise RepaError(f"{where} has {said}, which do not go together as [n, C, side, side]", AGAIN)
        wrong = [each for each in _VIEWS if dtypes[each] not in _FLOATS]
        wrong += [_LABELS] if dtypes[_LABELS] not in ("I64", "I32") else []
        if wrong:
            raise RepaError(f"{where} has {wrong[0]} in {dtypes[wrong[0]]}", AGAIN, field=wrong[0])
        shape = (2 * image[0], image[1], image[2])
        if getattr(self, "shape", shape) != shape or 4 * np.prod(image) > MOST_BYTES:
            raise RepaError(
                f"{where} has latents {image}, and the others have "
                f"{[self.shape[0] // 2, *self.shape[1:]] if hasattr(self, 'shape') else 'room for less'}",
                "import files of one resolution and one autoencoder",
            )
        self.shape = shape
        return int(rows)

    def _where_rows_are(self, ranks: Sequence[Sequence[str]], counts: dict[str, int]) -> None:
        """Set the file and place in it of every row, in the order of the image folder, and the labels."""
        world = len(ranks)
        totals = [sum(counts[name] for name in shards) for shards in ranks]
        short = next((rank for rank, total in enumerate(totals) if total != totals[0]), None)
        if short is not None:
            raise RepaError(
                f"{self.place.name} has {totals[0]:,} rows of rank 0 and {totals[short]:,} of rank {short}, "
                "and LightningDiT writes as many for each",
                "bring all files of one extraction",
                field="FROM",
            )
        self._names = [name for shards in ranks for name in shards]
        numbers = {name: number for number, name in enumerate(self._names)}
        # row i of rank r is image i·W + r
        where = np.empty((totals[0], world, 2), dtype=np.int64)
        labels = np.empty((totals[0], world), dtype=np.int64)
        for rank, shards in enumerate(ranks):
            first = 0
            for name in shards:
                rows = slice(first, first + counts[name])
                where[rows, rank, 0] = numbers[name]
                where[rows, rank, 1] = np.arange(counts[name])
                labels[rows, rank] = self._file(name).get_tensor(_LABELS).numpy()
                first += counts[name]
        self._rows, self._all_labels = where.reshape(-1, 2), labels.reshape(-1)
        if self._all_labels.min() < 0:
            raise RepaError(f"{self.place.name} has the label {self._all_labels.min()}", AGAIN, field=_LABELS)
        self._world = world

    def _statistics(self, options: ForeignOptions) -> None:
        """Set the scale, of the statistics beside the files or of the flags."""
        if _STATISTICS in self.place.sizes:
            self.files = (*self.files, _STATISTICS)
            mean, std = self._read_statistics()
            self.scale = chosen_scale(LatentScale(1.0, 0.0, mean, std), options)
            return
        if options.scaling_factor is None:
            raise RepaError(
                f"{self.place.name} has no {_STATISTICS}, and nothing else says how these latents are scaled",
                "bring it, or give --scaling-factor (1, and train with --set latent_norm=channel, for "
                "statistics that are measured here)",
                field="--scaling-factor",
            )
        self.scale = chosen_scale(LatentScale(options.scaling_factor), options)

    def _read_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        import torch

        where = f"{self.place.name}/{_STATISTICS}"
        raw = self.place.read(_STATISTICS, _STATISTICS_BYTES)
        channels = self.shape[0] // 2
        try:
            found = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
            values = [
                tuple(found[name].detach().double().reshape(channels).tolist()) for name in ("mean", "std")
            ]
        # whatever a file may be that torch does not write so
        except Exception as error:
            reason = printable(" ".join(str(error).split())[:80])
            raise RepaError(
                f"{where} has no mean and std of {channels} channels ({reason})",
                "bring it again, or move it away and give --scaling-factor",
            ) from None
        return values[0], values[1]

    def _name_rows(self, options: ForeignOptions) -> None:
        """Set keys and labels, of the images where they are given, and leave out rows that came twice."""
        if options.data is not None:
            from ..images.open import open_source

            self._name_by(open_source(options.data, may_import=True))
            return
        twice = self._repeated()
        kept = len(self._rows) - twice
        self.remarks = (
            "these rows name no images: with --data IMAGES, the folder they were made from, teachers can be "
            "added later",
        )
        if twice:
            self.remarks += (f"{counted(twice, 'row')} at the end, which stand for no image, are left out",)
        self._keep(kept)
        self.keys = [
            f"{self._names[file].removesuffix('.safetensors')}/{row:08d}" for file, row in self._rows.tolist()
        ]
        self.class_names = class_names_of(self._all_labels, None, where=self.place.name)

    def _repeated(self) -> int:
        """Count the rows at the end that repeat the first images, so that all ranks had as many."""
        labels = self._all_labels
        falls = np.flatnonzero(np.diff(labels) < 0) + 1
        one = len(falls) == 1 and len(labels) - falls[0] < self._world
        if one and np.array_equal(labels[falls[0] :], labels[: len(labels) - falls[0]]):
            return int(len(labels) - falls[0])
        return 0

    def _name_by(self, images: ImageSource) -> None:
        count, total = len(images), len(self._rows)
        if not count <= total < count + self._world:
            raise RepaError(
                f"{images.name} has {count:,} images, and {self.place.name} has {total:,} rows of "
                f"{counted(self._world, 'process')}",
                "give --data the image folder that they were made from",
                field="--data",
            )
        keys, labels = list(images.keys), images.labels
        # as torchvision's ImageFolder sorts, whose order these rows have: by class, then by folder and name
        order = sorted(range(count), key=lambda row: _sorting(keys[row]))
        self._keep(count)
        wrong = np.flatnonzero(labels[order] != self._all_labels)
        if len(wrong):
            row = int(wrong[0])
            raise RepaError(
                f"{images.name} has {keys[order[row]]} in class {labels[order[row]]}, where row {row} of "
                f"{self.place.name} is of class {self._all_labels[row]}, and {len(wrong) - 1:,} more differ",
                "give --data the image folder that they were made from",
                field="--data",
            )
        self.keys = [keys[row] for row in order]
        self.class_names = tuple(images.class_names)

    def _keep(self, count: int) -> None:
        self._rows, self._all_labels = self._rows[:count], self._all_labels[:count]
        self.labels = self._all_labels.astype(np.int32)

    def _file(self, name: str) -> Any:
        """Return an open file. The caller holds the lock, or is alone."""
        from safetensors import SafetensorError, safe_open

        found = self._open.pop(name, None)
        if found is None:
            path = self._folder.path_of(name)
            try:
                with os_errors("read", path):
                    found = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise RepaError(f"{path} is damaged or cut off ({printable(error)})", AGAIN) from None
        self._open[name] = found
        while len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        return found

    def survey(self, name: str) -> str:
        """Return the sha256 of a file, see `ForeignLatents.survey`."""
        path = self._folder.path_of(name)
        with os_errors("read", path), open_regular(path) as file:
            digest = hashlib.file_digest(cast("io.BufferedReader", file), "sha256").hexdigest()
        if name != _STATISTICS:
            with self._lock:
                slices = [self._file(name).get_slice(view) for view in _VIEWS]
            for view, values in zip(_VIEWS, slices, strict=True):
                rows = values.get_shape()[0]
                for first in range(0, rows, _AT_ONCE):
                    with self._lock:
                        part = values[first : first + _AT_ONCE]
                    if not part.float().isfinite().all():
                        raise RepaError(f"{path} holds a number in {view} that is not finite", AGAIN)
        return digest

    def read(self, row: int) -> NDArray[np.float32]:
        """Return the moments of a row, see `ForeignLatents.read`."""
        number, place = self._rows[row].tolist()
        with self._lock:
            file = self._file(self._names[number])
            draws = [file.get_slice(view)[place : place + 1] for view in _VIEWS]
        # half precision is widened exactly
        return np.stack([moments_of_draw(each[0].float().numpy()) for each in draws])


def _sorting(key: str) -> tuple[str, str, str]:
    folder, _, name = key.rpartition("/")
    return key.partition("/")[0], folder, name


def open_latents(root: Path, options: ForeignOptions) -> LightningDit:
    """Return the latents of LightningDiT's layout, see `LightningDit`."""
    return LightningDit(root, options)
