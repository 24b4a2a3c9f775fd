"""The calibration that is fitted and measured on some images before a source is written, in its own file.

The file is safetensors: the projections, if queries and keys are cut by one basis, or the basis that factors
start from; and one metadata entry, JSON, with the settings it was made for and what was measured.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from safetensors.torch import load, save

from ...data.edge import parse
from ...data.errors import RepaError
from ...data.format.bounds import Count
from ...data.format.canonical import canonical_json
from ...data.format.factor_layout import FactorLayout
from ...data.format.notes import AttentionFidelity, TokenFidelity
from ...data.units import counted
from ..images.workers import decode_row

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..images.base import ImageSource

FIT_IMAGES = 128
HELD_OUT_IMAGES = 64

_METADATA = "repa"
_BASIS = "basis"
_LAYOUT = "layout"
_COUNT: Any = Count


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a calibration file holds.

    Attributes:
        settings: all that decides its content, plain JSON values.
        images: number of images the projections were fitted to; 0 without projections.
        fidelity: what was measured on held-out images, plain JSON values.
        projections: of queries and of centred keys, each float32 ``[L, H, r, Dh]``; None: nothing is cut by
            one basis.
        factors: components of every head and the basis that an image's own is found from, float64
            ``[L, H, Dh, Dh]``; None: images have no factors of their own.
    """

    settings: Mapping[str, Any]
    images: int
    fidelity: Mapping[str, Any]
    projections: tuple[Tensor, Tensor] | None = field(default=None, compare=False)
    factors: tuple[FactorLayout, Tensor] | None = field(default=None, compare=False)

    def encode(self) -> bytes:
        """Write the bytes of the file, equal for equal content."""
        tensors: dict[str, Tensor] = {}
        if self.projections is not None:
            tensors = {name: each.contiguous() for name, each in zip("qk", self.projections, strict=True)}
        values = {
            "settings": self.settings,
            "images": self.images,
            "fidelity": self.fidelity,
        }
        if self.factors is not None:
            layout, basis = self.factors
            tensors[_BASIS] = basis.contiguous()
            values[_LAYOUT] = layout.as_notes
        # one entry only: safetensors writes several in no fixed order
        data: bytes = save(tensors, {_METADATA: canonical_json(values).decode()})
        return data

    @classmethod
    def decode(cls, data: bytes) -> Calibration:
        """Parse the calibration in a file's bytes.

        Raises:
            ValueError: not what `encode` wrote.
        """
        try:
            # https://huggingface.co/docs/safetensors "Format": length of the JSON header, header, tensors
            (length,) = struct.unpack_from("<Q", data)
            values = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA])
            tensors = load(data)
            parse(_COUNT, values["images"], where="images")
            # checked here, as it is copied into a manifest, which could not be opened with wrong values
            kind: type[Any] = AttentionFidelity if "kl" in values["fidelity"] else TokenFidelity
            parse(kind, values["fidelity"], where="fidelity")
            layout, basis = values.pop(_LAYOUT, None), tensors.pop(_BASIS, None)
            return cls(
                **values,
                projections=(tensors["q"], tensors["k"]) if tensors else None,
                factors=None if basis is None else (FactorLayout.of_notes(layout), basis),
            )
        # safetensors has an error of its own for a broken file, which derives from Exception directly
        except Exception as error:
            raise ValueError(f"not a calibration: {error}") from error


@dataclass(frozen=True, kw_only=True)
class ChosenImages:
    """Images of a set, row → pixels uint8 ``[3, R, R]``, ascending by row.

    Of several views they are pictures, numbered view by view.

    Attributes:
        fit: those that projections are fitted to.
        held_out: others, on which fidelity is measured.
    """

    fit: Mapping[int, NDArray[np.uint8]]
    held_out: Mapping[int, NDArray[np.uint8]]


def choose_images(images: ImageSource, resolution: int) -> ChosenImages:
    """Pick images evenly spaced over a set.

    Up to 128 are to fit to, and up to 64 others, every third, are held out.

    Args:
        images: the set.
        resolution: side of the crop in pixels, R.

    Raises:
        RepaError: fewer than two of them can be decoded, or a file cannot be read.
    """
    picked = pick_images(images, resolution, FIT_IMAGES + HELD_OUT_IMAGES)
    rows = list(picked)
    if len(rows) < 2:
        raise RepaError(
            f"{images.name} has {counted(len(rows), 'image')} that can be decoded: the storage form is "
            "fitted to some and measured on others, so give --data with 2 at least, or leave int8, "
            "--attention-rank, --attention-kl and --attention-bytes out"
        )
    held_out = set(rows[2::3] or rows[1:])
    return ChosenImages(
        fit={row: picked[row] for row in rows if row not in held_out},
        held_out={row: picked[row] for row in rows if row in held_out},
    )


def pick_images(images: ImageSource, resolution: int, most: int) -> dict[int, NDArray[np.uint8]]:
    """Pick and decode images evenly spaced over a set, ascending by row.

    The first images would be of one class where a folder is sorted by class. One that cannot be decoded is
    replaced by the next that can, as long as that comes before the next image picked.

    Args:
        images: the set.
        resolution: side of the crop in pixels, R.
        most: how many.

    Returns:
        Row → pixels uint8 ``[3, R, R]``; fewer, or none, where too few can be decoded.

    Raises:
        RepaError: a file cannot be read.
    """
    count = min(len(images), most)
    starts = [number * len(images) // count for number in range(count + 1)]
    picked: dict[int, NDArray[np.uint8]] = {}
    for start, following in pairwise(starts):
        for row in range(start, following):
            pixels = decode_row(images, row, resolution)
            if not isinstance(pixels, str):
                picked[row] = pixels
                break
    return picked
