"""What an image shows, a shape and a colour, read from its pixels without any network.

A drawn shape is bright and its background dark, so the two part by brightness. Its hue is the mean colour's;
its form is the drawn one that it shares most with.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from . import RESOLUTION
from .shapes import CLASS_NAMES, HUES, coverage_of, scene

if TYPE_CHECKING:
    from numpy.typing import NDArray

BRIGHT: Final = 0.55
"""Between the brightest background, 0.32, and the darkest shape, 0.85, of the largest channel in [0, 1]."""

LIKENESS: Final = 0.6
"""Least share, of all that a drawn shape and an image's bright pixels cover, that both do."""


@dataclass(frozen=True)
class Seen:
    """What images show.

    Attributes:
        shapes: int64 ``[N]``, positions in `CLASS_NAMES`, −1 where none is like it.
        colours: int64 ``[N]``, positions in `HUES`, −1 where nothing is bright.
    """

    shapes: NDArray[np.int64]
    colours: NDArray[np.int64]


def seen(images: NDArray[np.uint8]) -> Seen:
    """Read shape and colour of images.

    Args:
        images: uint8 ``[N, 64, 64, 3]``.

    Raises:
        ValueError: they are of another size.
    """
    if images.shape[1:] != (RESOLUTION, RESOLUTION, 3):
        raise ValueError(f"images {images.shape} are not [N, {RESOLUTION}, {RESOLUTION}, 3]")
    bright = images.max(axis=3) > 255 * BRIGHT
    return Seen(
        shapes=np.array([_shape(mask) for mask in bright], np.int64),
        colours=np.array(
            [_colour(image[mask]) for image, mask in zip(images, bright, strict=True)], np.int64
        ),
    )


def _colour(pixels: NDArray[np.uint8]) -> int:
    """Return the hue that is nearest to the mean of pixels ``[P, 3]``."""
    if not len(pixels):
        return -1
    hue = colorsys.rgb_to_hsv(*(pixels.mean(axis=0) / 255.0))[0]
    distances = np.abs((np.array(HUES) - hue + 0.5) % 1.0 - 0.5)
    return int(distances.argmin())


def _shape(mask: NDArray[np.bool_]) -> int:
    """Return the class whose drawing overlaps most with a mask ``[64, 64]``, by intersection over union."""
    if not mask.any():
        return -1
    drawings = _drawings()
    flat = mask.reshape(-1).astype(np.float32)
    both = drawings @ flat
    overlap = (both / (drawings.sum(axis=1) + flat.sum() - both)).reshape(len(CLASS_NAMES), -1).max(axis=1)
    return int(overlap.argmax()) if overlap.max() >= LIKENESS else -1


@cache
def _drawings() -> NDArray[np.float32]:
    """Draw every class in several places and sizes of images, float32 ``[classes · 27, 4096]``."""
    middle = RESOLUTION / 2
    drawings = [
        coverage_of(replace(scene(label, 0), centre=(middle + x, middle + y), radius=radius, angle=0.0)) > 0.5
        for label in range(len(CLASS_NAMES))
        for x in (-1.5, 0.0, 1.5)
        for y in (-1.5, 0.0, 1.5)
        for radius in (20.5, 21.75, 23.0)
    ]
    return np.stack(drawings).reshape(len(drawings), -1).astype(np.float32)
