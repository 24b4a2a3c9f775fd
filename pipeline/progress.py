"""The progress of a `repa preprocess`, as bars on a terminal and as a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.units import counted, human_rate, human_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from rich.console import Console

LINE_SECONDS = 10.0


class ProgressView:
    """Images done of each source, images a second, time left.

    Args:
        console: a terminal gets a bar for each source, anything else a line every ten seconds.
        totals: source → images to do.
        images: images to go through, each once however many sources it is for.
        noun: what they are.
    """

    def __init__(
        self, console: Console, totals: Mapping[str, int], images: int, *, noun: str = "image"
    ) -> None:
        self._console = console
        self._noun = noun
        self._images = images
        self._done = 0
        self._first = self._next_line = 0.0
        self._first_images = 0
        self._bars: Progress | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._tasks = {
                source: self._bars.add_task(source, total=total, rate="")
                for source, total in totals.items()
                if total
            }

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self, rows: Mapping[str, int], images: int) -> None:
        """Count what has been written.

        Args:
            rows: source → rows.
            images: images gone through.
        """
        now = time.monotonic()
        if self._done == 0:
            # models were loaded until now: the first batch starts the clock of the rate
            self._first, self._first_images = now, images
            self._next_line = now + LINE_SECONDS
        self._done += images
        rate = self._rate(now)
        if self._bars is not None:
            for source in self._tasks.keys() & rows.keys():  # a commit may vanish after the plan was made
                self._bars.update(
                    self._tasks[source], advance=rows[source], rate=human_rate(rate) if rate else ""
                )
        elif now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            left = f", {human_seconds((self._images - self._done) / rate)} left" if rate else ""
            self._console.print(f"{self._done}/{counted(self._images, self._noun)}, {human_rate(rate)}{left}")

    def _rate(self, now: float) -> float:
        seconds = now - self._first
        return (self._done - self._first_images) / seconds if seconds > 0 else 0.0
