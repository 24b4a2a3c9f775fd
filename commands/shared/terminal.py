"""The terminal as commands print to it, where text of others appears and does nothing else.

Names of classes, models, images and columns come from folders, caches and checkpoints that anybody may have
made. In them an escape sequence would move the cursor, and Rich's markup would colour or fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.segment import Segment

from ...data.edge import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import ConsoleOptions, RenderableType


class PlainConsole(Console):
    """A console that takes no markup and no emoji codes, and escapes what is not printable.

    Args:
        options: of `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Return the segments of what is printed, their text printable but for line ends."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            if control is None and not text.isprintable():
                text = "\n".join(map(printable, text.split("\n")))
            yield Segment(text, style, control)
