"""From the bytes of a file to an RGB image."""

from __future__ import annotations

import warnings
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .base import UndecodableImage

# What a file is, is read from its content: ImageNet has a PNG named .JPEG. Formats that call other programs
# (EPS) or that hold pixels `convert` has no rule for (TIFF in float) stay closed.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


MAX_REASON = 160
MAX_BYTES = 1 << 30  # more than Pillow's limit of pixels takes in any format


def decode_image(content: bytes, *, apply_exif: bool = False) -> Image.Image:
    """Decode an encoded image to RGB.

    Pixel modes become RGB by Pillow's ``convert("RGB")``, exactly as the reference does:

    - 1, L: grey repeated;
    - LA, RGBA: alpha dropped, not composited, so hidden colours show;
    - P: the palette's colours, transparency dropped;
    - CMYK (Adobe's inverted JPEGs are turned by Pillow's decoder): Pillow's plain conversion;
    - I;16, grey PNGs of 16 bits: *ours*, the high byte, as Pillow itself reads 16-bit colour PNGs;
      ``convert`` would clip every value over 255 to white.

    Of an animation the first frame is taken. Colour profiles are ignored.

    Args:
        content: bytes of the file.
        apply_exif: turn the image by its EXIF orientation.

    Raises:
        UndecodableImage: not an image, truncated, too many bytes, or larger than Pillow's limit against
            decompression bombs (89 million pixels).
    """
    if len(content) > MAX_BYTES:
        raise UndecodableImage(f"more than {MAX_BYTES:,} bytes")
    if not content:
        raise UndecodableImage("empty file (0 bytes)")
    try:
        with warnings.catch_warnings():
            # of a palette's transparency, of odd EXIF data: both are dropped anyway
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image) if apply_exif else image)
    except UnidentifiedImageError:
        raise UndecodableImage("not a JPEG, PNG or WebP image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UndecodableImage(f"more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels (Pillow's limit)") from None
    except MemoryError:
        raise
    # a broken file makes Pillow's decoders raise anything: OSError, SyntaxError, ValueError, struct.error, …
    except Exception as error:
        raise UndecodableImage(_short(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image)  # uint16, in the machine's byte order
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UndecodableImage(f"pixels of mode {image.mode}, whose range is not known")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _short(error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 1]}…"
