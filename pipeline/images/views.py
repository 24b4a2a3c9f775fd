"""The views of an image, which are fixed forms of its pixels after the crop.

A mirrored image is exactly that: the uint8 pixels in reverse order along each row, before any model maps or
scales them. What a model makes of it is not the mirrored output of the original.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ...data.errors import CacheError
from ...data.format.manifest import MIRRORED_VIEW, ORIGINAL_VIEW

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from ...data.storage.bucket import CachePath

    Compute = Callable[[torch.Tensor], dict[str, torch.Tensor]]

_VIEWS = (ORIGINAL_VIEW, MIRRORED_VIEW)


def check_views(views: Sequence[str], cache: CachePath) -> None:
    """Refuse views that no pixels can be made for, which a cache from elsewhere may have.

    Args:
        views: of a cache.
        cache: the cache, for the error.

    Raises:
        CacheError: which.
    """
    unknown = [view for view in views if view not in _VIEWS]
    if unknown:
        raise CacheError(
            f"cache {cache} has the view {unknown[0]}, and images are encoded as {' or '.join(_VIEWS)}",
            "train from what the cache holds, or write another with --cache",
            field="--views",
        )


def in_view(images: torch.Tensor, view: str) -> torch.Tensor:
    """Return images as they are in a view.

    Args:
        images: uint8 ``[…, 3, R, R]``.
        view: one that `check_views` lets through.
    """
    return images.flip(-1) if view == MIRRORED_VIEW else images


def in_each_view(compute: Compute, views: Sequence[str]) -> Compute:
    """Return what computes columns ``[B, V, *shape]`` of images, in one forward pass for each view.

    A pass has the images of one view alone, so a view is to the bit what it would be in a cache of its own.

    Args:
        compute: uint8 images ``[B, 3, R, R]`` → column → ``[B, *shape]``.
        views: V of them.
    """

    def each(images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = [compute(in_view(images, view)) for view in views]
        if len(found) == 1:
            return {name: values.unsqueeze(1) for name, values in found[0].items()}
        return {name: torch.stack([columns[name] for columns in found], dim=1) for name in found[0]}

    return each


def pixels_in_views(
    pixels: Mapping[int, NDArray[np.uint8]], views: Sequence[str]
) -> Mapping[int, NDArray[np.uint8]]:
    """Return pictures of images in all views, numbered view by view.

    Args:
        pixels: row → uint8 ``[3, R, R]``.
        views: the views; with one alone the rows stay the numbers.
    """
    if tuple(views) == (ORIGINAL_VIEW,):
        return pixels
    pictures = [
        np.ascontiguousarray(image[..., ::-1]) if view == MIRRORED_VIEW else image
        for view in views
        for image in pixels.values()
    ]
    return dict(enumerate(pictures))
