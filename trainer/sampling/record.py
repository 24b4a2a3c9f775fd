"""A folder of samples, which holds one sampling and its record, never two mixed.

``sampling.json`` is written before the first image and says what the images are of; a folder whose record
says something else is left alone. What an interrupted sampling has written, the same sampling goes on from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...data.edge import parse_json, shortened
from ...data.errors import RepaError
from ...data.storage.files import make_folder, os_errors, write_file
from .pictures import make_grid, save_array_file, save_png

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

RECORD_FILE = "sampling.json"
GRID_FILE = "grid.png"
ARRAY_FILE = "samples.npz"
_PARTS = ".parts"
_GRID_IMAGES = 64
_REPLACE = "choose another folder with --out, or give --replace to replace what is there"


@dataclass(frozen=True, kw_only=True)
class SamplingRecord:
    """What the images of a folder are of. Equal records make equal images.

    Attributes:
        checkpoint: name of the file.
        checkpoint_sha256: of the file.
        step: training steps it had; None if the file does not say.
        weights: ``ema`` or ``model``.
        family: of a published checkpoint that does not say what it is of, None of all others.
        autoencoder: what decoded the latents, by name or folder.
        autoencoder_sha256: of its weights.
        num: number of images.
        labels: classes, in turn; none takes all of them, as the next says.
        label_mode: ``balanced``, every class equally often, or ``random``, drawn.
        solver: see `SamplerConfig`.
        steps: of the solver.
        shift: of its times.
        guidance: see `SamplerConfig`.
        guidance_cls: of the vectors beside the latent, None where there are none.
        guidance_channels: see `SamplerConfig`.
        interval: see `SamplerConfig`.
        bank: digest of the bank whose vectors the images are conditioned on; None for labels.
        vectors: which of its vectors, in words.
        prompts: text of each image, in turn; none of a model that reads no text.
        condition_sha256: of the conditions themselves, float32, in turn; None for labels.
        seed: of the noise.
        batch_size: images of a forward pass, which decides how matrix products are rounded.
        form: ``png``, a file for each image, or ``npz``, one array.
        finished: whether all images are there.
    """

    checkpoint: str
    checkpoint_sha256: str
    step: int | None
    weights: str
    family: str | None = None
    autoencoder: str
    autoencoder_sha256: str
    num: int
    labels: tuple[int, ...]
    label_mode: str = "balanced"
    solver: str
    steps: int
    shift: float = 1.0
    guidance: float
    guidance_cls: float | None = None
    guidance_channels: str = "all"
    interval: tuple[float, float]
    bank: str | None = None
    vectors: str | None = None
    prompts: tuple[str, ...] = ()
    condition_sha256: str | None = None
    seed: int
    batch_size: int
    form: str
    finished: bool = False


class SampleFolder:
    """The folder of one sampling.

    Args:
        path: the folder, which need not be there.
        record: the sampling that it is to hold.
    """

    def __init__(self, path: Path, record: SamplingRecord) -> None:
        self.path = path
        self.record = record

    def open(self, *, replace_other: bool) -> None:
        """Make the folder this sampling's, before anything is sampled.

        Args:
            replace_other: remove the images and the record of another sampling that is there.

        Raises:
            RepaError: it holds another sampling, or the disk refuses.
        """
        with os_errors("write", self.path):
            make_folder(self.path)
            present = self._files()
            if present and not self._is_ours(replace_other):
                for file in present:
                    shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
                present = []
        if not present:
            self._write(self.record)

    def missing(self) -> list[int]:
        """Return the first image of each batch that is not whole yet, ascending."""
        if (self.path / ARRAY_FILE).exists():
            return []
        starts = range(0, self.record.num, self.record.batch_size)
        return [first for first in starts if not all(file.exists() for file in self._batch_files(first))]

    def write_batch(self, first: int, images: NDArray[np.uint8]) -> None:
        """Write the images of a batch, each file whole or not at all.

        Args:
            first: number of the first of them.
            images: uint8 ``[B, H, W, 3]``.

        Raises:
            RepaError: the disk refuses.
        """
        files = self._batch_files(first)
        if self.record.form == "png":
            for file, image in zip(files, images, strict=True):
                save_png(Image.fromarray(image), file)
            return
        with os_errors("write", files[0]):
            make_folder(files[0].parent)
            partial = files[0].with_suffix(".partial")
            with partial.open("wb") as opened:
                np.save(opened, images, allow_pickle=False)
            partial.replace(files[0])

    def finish(self, labels: NDArray[Any]) -> None:
        """Join what the batches left, draw a grid of the first images and close the record.

        Args:
            labels: condition of each image, ``[N, …]``; for labels int64 ``[N]``.

        Raises:
            RepaError: the disk refuses.
        """
        shown: list[NDArray[np.uint8]] = []

        def batches() -> Iterator[NDArray[np.uint8]]:
            for first in range(0, self.record.num, self.record.batch_size):
                batch = self._read_batch(first)
                shown.extend(batch[: max(_GRID_IMAGES - len(shown), 0)])
                yield batch

        with os_errors("write", self.path):
            if self.record.form == "npz":
                if not (self.path / ARRAY_FILE).exists():
                    save_array_file(self.path / ARRAY_FILE, batches(), labels)
                    save_png(make_grid(np.stack(shown)), self.path / GRID_FILE)
                shutil.rmtree(self.path / _PARTS, ignore_errors=True)
            else:
                for _ in batches():
                    if len(shown) >= min(_GRID_IMAGES, self.record.num):
                        break
                save_png(make_grid(np.stack(shown)), self.path / GRID_FILE)
        self._write(replace(self.record, finished=True))

    def _is_ours(self, replace_other: bool) -> bool:
        """Tell whether what is there is of this sampling. If not, it is to be replaced.

        Raises:
            RepaError: neither.
        """
        file = self.path / RECORD_FILE
        if file.exists():
            raw = file.read_bytes()
            try:
                found = parse_json(
                    SamplingRecord, raw, where=str(file), remedy=_REPLACE, error=RepaError, most_bytes=1 << 24
                )
            except RepaError:
                if replace_other:
                    return False
                raise
            differing = _differences(found, self.record)
            if not differing:
                return True
            what = f"{self.path} holds another sampling: {', '.join(differing)}"
        else:
            what = f"{self.path} holds images of a sampling that left no record"
        if replace_other:
            return False
        raise RepaError(what, _REPLACE, field="--out")

    def _files(self) -> list[Path]:
        """List what a sampling leaves in a folder. Anything else there is not touched."""
        names = (RECORD_FILE, GRID_FILE, ARRAY_FILE, _PARTS)
        found = [self.path / name for name in names if (self.path / name).exists()]
        return [*found, *self.path.glob("[0-9][0-9][0-9][0-9][0-9][0-9]*.png")]

    def _batch_files(self, first: int) -> list[Path]:
        if self.record.form == "npz":
            return [self.path / _PARTS / f"{first:06d}.npy"]
        last = min(first + self.record.batch_size, self.record.num)
        return [self.path / f"{number:06d}.png" for number in range(first, last)]

    def _read_batch(self, first: int) -> NDArray[np.uint8]:
        files = self._batch_files(first)
        if self.record.form == "npz":
            batch: NDArray[np.uint8] = np.load(files[0], allow_pickle=False)
            return batch
        images = []
        for file in files:
            with Image.open(file) as image:
                images.append(np.asarray(image.convert("RGB")))
        return np.stack(images)

    def _write(self, record: SamplingRecord) -> None:
        file = self.path / RECORD_FILE
        with os_errors("write", file):
            write_file(file, (json.dumps(asdict(record), indent=2) + "\n").encode(), self.path)


def _differences(found: SamplingRecord, wanted: SamplingRecord) -> list[str]:
    names = [each.name for each in fields(SamplingRecord) if each.name not in ("finished", "checkpoint")]
    return [
        f"{name} ({shortened(getattr(found, name))} → {shortened(getattr(wanted, name))})"
        for name in names
        if getattr(found, name) != getattr(wanted, name)
    ]


def sha256_of(file: Path) -> str:
    """Return the hash of a file.

    Raises:
        RepaError: it cannot be read.
    """
    with os_errors("read", file), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
