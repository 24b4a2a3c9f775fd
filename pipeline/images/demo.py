"""The demo's drawn images as what ``--data demo`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ..demo.shapes import DemoImages

if TYPE_CHECKING:
    from .base import SourceOptions

DEMO_IMAGES = 2048
MOST_DEMO_IMAGES = 1_000_000  # five digits a class


def open_images(data: str, options: SourceOptions) -> DemoImages:
    """Return as many drawn images as ``limit`` says, 2,048 by default.

    Raises:
        RepaError: more than the demo draws.
    """
    del data
    if options.limit is not None and options.limit > MOST_DEMO_IMAGES:
        raise RepaError(
            f"--limit {options.limit} asks for more images than the demo draws",
            f"give at most {MOST_DEMO_IMAGES:,}",
            field="--limit",
        )
    return DemoImages(count=options.limit or DEMO_IMAGES)
