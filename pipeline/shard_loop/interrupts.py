"""Ctrl-C and SIGTERM while threads work, noted at once and acted on where nothing is left half done."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Note the signals in this block instead of raising anywhere.

    Python raises KeyboardInterrupt between any two instructions, also within the locks of a queue, which then
    stay as they were. A second signal raises at once all the same, in case the first is never looked at.

    Yields:
        A function that raises KeyboardInterrupt if a signal has come; so does the end of the block.
    """
    noted = False

    def check() -> None:
        if noted:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check  # signals are the main thread's
        return

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        check()
        noted = True

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    check()


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt in this block on SIGTERM, a scheduler's way to stop, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
