"""Class tokens of image files, as a cache that has been written would have them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...data.edge import shortened
from ...data.errors import RepaError
from ...data.format.columns import source_of
from ...data.format.manifest import ORIGINAL_VIEW
from ...data.storage.files import os_errors, read_file
from ...pipeline.images.base import UndecodableImage
from ...pipeline.images.decode import MAX_BYTES, decode_image
from ...pipeline.images.pixels import center_crop_adm
from ...trainer.evaluation.networks import POOL
from .encoders import parse_weights
from .features import NetworkSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ...trainer.sampling.bank import BankSaid

_FLAG = "--like"


def class_tokens(images: Sequence[str], said: BankSaid, encoder_weights: Sequence[str]) -> list[Tensor]:
    """Encode image files as the images of a bank were, and round them as float16 columns are.

    Args:
        images: the files.
        said: what the bank is of.
        encoder_weights: texts ``NAME=FILE``.

    Returns:
        float32 ``[D]`` each.

    Raises:
        RepaError: a file is no image, the bank is of another view, or the teacher cannot be had.
    """
    name = source_of(said.column)
    files = parse_weights(encoder_weights, flag="--encoder-weights")
    if needless := [each for each in files if each != name]:
        raise RepaError(
            f"the bank is of {name}, not of {needless[0]}", "leave its weights out", field="--encoder-weights"
        )
    if said.view != ORIGINAL_VIEW:
        raise RepaError(
            f"the bank is of the view {said.view}, and an image is taken as it is",
            "give a bank of the original view, or a row",
            field=_FLAG,
        )
    pixels = np.stack([_pixels(each, said) for each in images])
    spec = NetworkSpec(name=name, weights=files.get(name), resolution=said.resolution, recorded=said.teacher)
    network = spec.load("cpu")
    # one by one, as the batch that an image is in may change its last bits
    found = [network.features(torch.from_numpy(each[None]))[POOL][0] for each in pixels]
    return [each.half().float() for each in found]


def _pixels(image: str, said: BankSaid) -> np.ndarray:
    """Return the cropped pixels of a file, uint8 ``[3, R, R]``.

    Raises:
        RepaError: it is no image.
    """
    path = Path(image)
    if not path.is_file():
        raise RepaError(
            f"{shortened(image)} is no row of the bank and no file",
            "give the number of a row, or an image",
            field=_FLAG,
        )
    with os_errors("read", path):
        content = read_file(path, MAX_BYTES)
    try:
        decoded = decode_image(content, apply_exif=said.exif_orientation == "applied")
    except UndecodableImage as error:
        raise RepaError(
            f"{shortened(image)} cannot be decoded ({error.reason})", "give another image", field=_FLAG
        ) from None
    return np.ascontiguousarray(center_crop_adm(decoded, said.resolution).transpose(2, 0, 1))
