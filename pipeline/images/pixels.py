"""The way from an image to what the models see, by crop and value range.

The crop is the one of ADM (guided-diffusion), which the reference statistics of FID were made with: filters
and rounding matter, and are Pillow's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .base import UndecodableImage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor


def center_crop_adm(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Square centre crop, bit-exact with the reference under the same Pillow.

    While the smaller side is at least twice ``size`` the image is halved by BOX (sides floored); then it is
    scaled by BICUBIC so that the smaller side is ``size``, the other ``round``ed; then cropped, the margin's
    odd pixel going to the right and below. Smaller images are enlarged.

    Args:
        image: RGB.
        size: side of the crop in pixels.

    Returns:
        uint8 ``[size, size, 3]``.

    Raises:
        UndecodableImage: so elongated that the scaled image would have more than Pillow's limit of pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise UndecodableImage(f"{image.width}x{image.height} pixels: too elongated to crop to {size}")
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def to_autoencoder_input(images: Tensor) -> Tensor:
    """Map pixels to [−1, 1] for the autoencoder, x / 127.5 − 1.

    Args:
        images: uint8 ``[B, 3, R, R]``.

    Returns:
        float32 of the same shape.
    """
    return images.to(torch.float32) / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Map [−1, 1] back as the reference saves samples, 255 · ((x + 1) / 2), clamped to [0, 255], truncated.

    Rounding would be half a level brighter on average; the reference's FIDs are of samples cut off.

    Args:
        images: float ``[B, 3, R, R]``, in [−1, 1] up to overshoot.

    Returns:
        uint8 of the same shape.
    """
    return (255 * ((images.to(torch.float32) + 1) / 2)).clamp(0, 255).to(torch.uint8)


def to_teacher_input(
    images: Tensor, input_size: int, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> Tensor:
    """Prepare pixels for a teacher in the order of the reference, which is / 255, normalise, then bicubic.

    The scaling is `torch.nn.functional.interpolate` with its default settings (no antialias,
    ``align_corners`` false), and is left out where the size already fits.

    Args:
        images: uint8 ``[B, 3, R, R]``.
        input_size: side that the teacher sees, in pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel.

    Returns:
        float32 ``[B, 3, input_size, input_size]``.
    """
    shift = torch.as_tensor(mean, dtype=torch.float32, device=images.device).view(1, 3, 1, 1)
    scale = torch.as_tensor(std, dtype=torch.float32, device=images.device).view(1, 3, 1, 1)
    pixels = (images.to(torch.float32) / 255 - shift) / scale
    if pixels.shape[-1] == input_size:
        return pixels
    return F.interpolate(pixels, size=(input_size, input_size), mode="bicubic")
