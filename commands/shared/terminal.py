"""The terminal as commands print to it, where text of others appears and does nothing else.

Names of classes, models, images and columns come from folders, caches and checkpoints that anybody may have
made. In them an escape sequence would move the cursor, and Rich's markup would colour or fail.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segment

from ...data.edge import printable
from ...data.units import counted, human_rate, human_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import ConsoleOptions, RenderableType
    from rich.table import Table

LINE_SECONDS = 15.0
_WIDEST = 400  # characters of a table in a file


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


def print_figures(console: Console, table: Table) -> None:
    """Print a table of figures, as wide as it is where no terminal has a width, so that none is cut off.

    Args:
        console: where to.
        table: its columns may break their headings.
    """
    if console.is_terminal:
        console.print(table)
        return
    wide = console.options.update(max_width=_WIDEST)
    before = console.width
    console.width = max(before, Measurement.get(console, wide, table).maximum)
    try:
        console.print(table)
    finally:
        console.width = before


@contextmanager
def progress(total: int, console: Console, what: str) -> Iterator[Callable[[int], None]]:
    """Show images done, images a second and time left, as a bar on a terminal, elsewhere now and then a line.

    Args:
        total: images to do.
        console: where to.
        what: what is done, as ``sampling``.

    Yields:
        A function that takes the number of images that have come since the last call.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    began = said = time.monotonic()
    done = 0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total, rate="")

        def report(count: int) -> None:
            nonlocal done, said
            done += count
            now = time.monotonic()
            rate = done / max(now - began, 1e-9)
            bar.update(task, advance=count, rate=human_rate(rate))
            if not console.is_terminal and now - said > LINE_SECONDS:
                said = now
                console.print(
                    f"{what}: {done:,} of {counted(total, 'image', ',')}, {human_rate(rate)}, "
                    f"{human_seconds((total - done) / rate)} left",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )

        yield report
