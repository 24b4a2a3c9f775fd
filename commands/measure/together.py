"""Processes that measure at the same time, as the ranks of a training on one machine read.

They stay for all measurements, so that imports are paid for once, and start each one together.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import BrokenBarrierError
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...data.errors import RepaError
from ...pipeline.shard_loop.interrupts import terminated_as_interrupt
from ...pipeline.shard_loop.processes import deaf_to_interrupts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection

_GRACE_SECONDS = 5.0


class Meeting(Protocol):
    """Where processes wait for one another."""

    def wait(self) -> object:
        """Return once all have come."""
        ...


class Alone:
    """The meeting of one process."""

    def wait(self) -> None:
        """Return at once."""


@dataclass(frozen=True)
class Place:
    """One of the processes.

    Attributes:
        number: of this one, from 0.
        count: how many there are.
        meeting: of all of them.
    """

    number: int
    count: int
    meeting: Meeting


class Share(NamedTuple):
    """What one process measured.

    Attributes:
        rows: that it read.
        started: when, by the clock that all processes of a machine share.
        stopped: when it had read them.
        cpu: seconds of all its threads meanwhile.
        opening: seconds until it could read.
        memory: bytes of its own that it took for reading; pages of files and of the interpreter left out.
        open_files: descriptors that it held when it stopped.
    """

    rows: int
    started: float
    stopped: float
    cpu: float
    opening: float = 0.0
    memory: int = 0
    open_files: int = 0


class Measuring(Protocol):
    """What every process does. It can be pickled."""

    def __call__(self, place: Place) -> Share:
        """Measure one process's share."""
        ...


class Together(NamedTuple):
    """What processes measured that began together.

    Attributes:
        shares: of each.
    """

    shares: tuple[Share, ...]

    @property
    def rows(self) -> int:
        """Count the rows that all of them read."""
        return sum(share.rows for share in self.shares)

    @property
    def seconds(self) -> float:
        """Seconds from the first start to the last stop."""
        return max(share.stopped for share in self.shares) - min(share.started for share in self.shares)

    @property
    def rate(self) -> float:
        """Rows a second, of all processes."""
        return self.rows / self.seconds

    @property
    def cpu_per_1000(self) -> float:
        """CPU seconds of 1,000 rows."""
        return 1000 * sum(share.cpu for share in self.shares) / self.rows


class Processes:
    """Processes that wait for something to measure. `processes` starts and ends them.

    Attributes:
        count: how many there are.
    """

    def __init__(self, connections: Sequence[Connection], children: Sequence[Any]) -> None:
        self.count = len(children)
        self._connections = connections
        self._children = children

    def measure(self, measuring: Measuring) -> Together:
        """Measure in all of them at once.

        Raises:
            RepaError: in one of them, or one was killed.
        """
        for connection in self._connections:
            connection.send(measuring)
        found = [self._answer(number) for number in range(len(self._connections))]
        # that the others were left waiting is not what is wrong
        wrong = [each for each in found if isinstance(each, RepaError)]
        for each in wrong:
            raise each
        return Together(tuple(each for each in found if isinstance(each, Share)))

    def _answer(self, number: int) -> Share | RepaError | None:
        try:
            answer = self._connections[number].recv()
        except (EOFError, OSError):
            child = self._children[number]
            child.join(_GRACE_SECONDS)
            return RepaError(
                f"process {number} of {len(self._children)} ended with status {child.exitcode}",
                "measure fewer --processes, or look at the machine's memory",
                field="--processes",
            )
        return answer if isinstance(answer, (Share, RepaError)) else None


@contextmanager
def processes(count: int, *, preload: Sequence[str] = ()) -> Iterator[Processes]:
    """Start processes, and end them after the block.

    Args:
        count: how many.
        preload: modules that all of them need, imported once.
    """
    # forks of a process that has no threads, and has imported what each would import for itself
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *preload])
    barrier = context.Barrier(count)
    connections, children = [], []
    try:
        with deaf_to_interrupts():
            for number in range(count):
                here, there = context.Pipe()
                child = context.Process(target=_serve, args=(number, count, barrier, there), daemon=True)
                child.start()
                there.close()
                children.append(child)
                connections.append(here)
        yield Processes(connections, children)
    finally:
        for connection in connections:
            with suppress(OSError):
                connection.send(None)
            connection.close()
        for child in children:
            child.join(_GRACE_SECONDS)
            if child.is_alive():
                child.kill()


def _serve(number: int, count: int, barrier: Any, connection: Connection) -> None:
    """Measure whatever is sent, until there is nothing more."""
    place = Place(number, count, barrier)
    with suppress(KeyboardInterrupt, EOFError), terminated_as_interrupt():
        while (measuring := connection.recv()) is not None:
            try:
                answer = measuring(place)
            except BrokenBarrierError:
                answer = None  # another one failed
            except RepaError as error:
                answer = error
            except Exception as error:
                traceback.print_exc()
                answer = RepaError(f"process {number}: {type(error).__name__}: {error}", field="--processes")
            if not isinstance(answer, Share):
                barrier.abort()
            connection.send(answer)


class Stopwatch:
    """The share of this process, from when all have come together to the end of the context.

    Args:
        place: of this process.
    """

    def __init__(self, place: Place) -> None:
        self._place = place

    def __enter__(self) -> Stopwatch:
        self._place.meeting.wait()
        self._started, self._cpu = time.monotonic(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped, self._used = time.monotonic(), time.process_time() - self._cpu

    def share(self, rows: int, **beside: Any) -> Share:
        """Return what was measured, of so many rows."""
        return Share(rows, self._started, self._stopped, self._used, **beside)


def own_memory() -> int:
    """Return the bytes that this process holds alone, files mapped into it left out.

    Zero where nothing says how many.
    """
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])
    return 0


def open_descriptors() -> int:
    """Count the descriptors of this process.

    Zero where nothing lists them.
    """
    with suppress(OSError):
        return len(list(Path("/proc/self/fd").iterdir())) - 1  # the look itself takes one
    return 0
