"""Grids of images as PNG files."""

from __future__ import annotations

import math
import zipfile
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ...data.storage.files import create_file, make_folder, os_errors, partial_path

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

_MARGIN = 2


def grid_shape(count: int) -> tuple[int, int]:
    """Return rows and columns of the squarest grid that holds a number of images."""
    columns = math.ceil(math.sqrt(count))
    return math.ceil(count / columns), columns


def make_grid(images: NDArray[np.uint8], columns: int | None = None) -> Image.Image:
    """Put images side by side on white, row by row.

    Args:
        images: uint8 ``[N, H, W, 3]``.
        columns: images in a row; by default the squarest grid's.
    """
    count, height, width, _ = images.shape
    if columns is None:
        columns = grid_shape(count)[1]
    rows = math.ceil(count / columns)
    canvas = np.full(
        (rows * (height + _MARGIN) + _MARGIN, columns * (width + _MARGIN) + _MARGIN, 3), 255, dtype=np.uint8
    )
    for number, image in enumerate(images):
        top = _MARGIN + number // columns * (height + _MARGIN)
        left = _MARGIN + number % columns * (width + _MARGIN)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def save_png(image: Image.Image, path: Path, root: Path | None = None) -> None:
    """Write a PNG file whole or not at all, making its folder.

    Args:
        image: the image.
        path: the file.
        root: folder above it below which no link is followed.

    Raises:
        RepaError: the disk refuses.
    """
    with os_errors("write", path):
        make_folder(path.parent, root)
        partial = partial_path(path)
        try:
            with open(create_file(partial), "wb") as file:
                image.save(file, format="PNG")
        except OSError:
            # a full disk needs the room
            with suppress(OSError):
                partial.unlink()
            raise
        partial.replace(path)


def save_array_file(path: Path, batches: Iterable[NDArray[np.uint8]], labels: NDArray[np.int64]) -> None:
    """Write images as the ADM evaluation suite reads them, an .npz with ``arr_0`` uint8 ``[N, H, W, 3]``.

    The labels are ``arr_1``, int64 ``[N]``. Batches are written as they come, so the file may be larger than
    the memory. Format: NumPy's NEP 1 arrays, stored in a zip file.

    Args:
        path: the file.
        batches: uint8 ``[B, H, W, 3]``, N images in all.
        labels: class of each image.

    Raises:
        RepaError: the disk refuses.
        ValueError: another number of images than labels.
    """
    partial = partial_path(path)
    with os_errors("write", path):
        make_folder(path.parent)
        with (
            open(create_file(partial), "wb") as whole,
            zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive,
        ):
            written = 0
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                for batch in batches:
                    if not written:
                        shape = (len(labels), *batch.shape[1:])
                        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(np.ascontiguousarray(batch).tobytes())
                    written += len(batch)
            if written != len(labels):
                raise ValueError(f"{written} images came for {len(labels)} labels")
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(labels), allow_pickle=False)
        partial.replace(path)
