"""The layouts that are imported, one row and one file each with its ``open_latents``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from ...data.errors import RepaError

if TYPE_CHECKING:
    from pathlib import Path

    from .base import ForeignLatents, ForeignOptions

LAYOUTS: Final = {
    "repa": "repa_tree",
    "lightningdit": "lightningdit",
    "fast-dit": "fast_dit",
    "mar": "mar",
}
"""What ``--format`` of `repa cache import` takes beside our own tars → module."""

_NAMES_NO_IMAGE = ("lightningdit",)


def open_foreign(layout: str, root: Path, options: ForeignOptions) -> ForeignLatents:
    """Return the latents that another program wrote in a folder.

    Args:
        layout: one of `LAYOUTS`.
        root: the folder, or what the layout has instead.
        options: of the command.

    Raises:
        RepaError: no such layout, a flag that means nothing for it, or the latents are not as it says.
    """
    if layout not in LAYOUTS:
        raise RepaError(f"--format {layout!r} is unknown", f"there is {', '.join(LAYOUTS)}", field="--format")
    if options.data is not None and layout not in _NAMES_NO_IMAGE:
        raise RepaError(
            f"--data names the rows of layouts that name none, and {layout} is not one",
            "leave it out; `repa preprocess` takes it when teachers are added",
            field="--data",
        )
    found: ForeignLatents = import_module(f".{LAYOUTS[layout]}", __package__).open_latents(root, options)
    return found
