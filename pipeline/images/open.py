"""The images that ``--data`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.tars.names import names_tars
from .folder import FolderImages
from .names import HUGGING_FACE

if TYPE_CHECKING:
    from pathlib import Path

    from .base import ImageSource

DEMO = "demo"
DEMO_IMAGES = 2048
MOST_DEMO_IMAGES = 1 << 20


def open_source(
    data: str,
    *,
    limit: int | None = None,
    apply_exif: bool = False,
    class_names: Path | None = None,
) -> ImageSource:
    """The images that ``--data`` names.

    Args:
        data: folder, tars (see `TarImages`), ``hf:…`` (see `HubImages`), or ``demo``.
        limit: number of images; None takes all (of the demo: 2,048).
        apply_exif: turn images by their EXIF orientation.
        class_names: file with the name of a class in each line, of tars.

    Raises:
        RepaError: see `FolderImages`, `TarImages` and `HubImages`.
    """
    if limit is not None and limit < 1:
        raise RepaError(f"--limit {limit} asks for no image", "give 1 or more", field="--limit")
    if names_tars(data):
        from .tars import TarImages

        return TarImages(data, apply_exif=apply_exif, limit=limit, class_names=class_names)
    if class_names is not None:
        raise RepaError("--class-names is for tars, whose classes are numbers", f"leave it out for {data}")
    if data.startswith(HUGGING_FACE):
        from .hub import HubImages

        return HubImages(data.removeprefix(HUGGING_FACE), apply_exif=apply_exif, limit=limit)
    if data == DEMO:
        from ..demo.shapes import DemoImages

        if limit is not None and limit > MOST_DEMO_IMAGES:
            raise RepaError(
                f"--limit {limit} asks for more images than the demo draws",
                f"give at most {MOST_DEMO_IMAGES:,}",
                field="--limit",
            )
        return DemoImages(count=limit or DEMO_IMAGES)
    return FolderImages(data, apply_exif=apply_exif, limit=limit)
