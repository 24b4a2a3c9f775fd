"""Several processes on one machine, watched by the one that started them and ended with it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol

from ...data.errors import RepaError
from .interrupts import terminated_as_interrupt
from .worker import work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from multiprocessing.context import SpawnProcess

    from .worker import Report, Tally

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_GRACE_SECONDS = 5.0


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends, however it ends. Orphans would go on writing.

    Args:
        parent: process id of the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)  # it ended before we asked


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Start processes in this block, and Ctrl-C, which a terminal sends to all, reaches only this one.

    A child inherits the blocked signal; this process gets it when the block ends.
    """
    # starting its helper, multiprocessing lets the signal through again (Python 3.11)
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ProcessJob(Protocol):
    """What one of several processes does, whatever it is.

    Attributes:
        rank: this process, of ``world``.
        world: number of processes.
        device: that it computes on.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def world(self) -> int: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102


def work_in_processes(
    jobs: Sequence[ProcessJob], given: Any, report: Report, *, do: Callable[..., Tally] = work
) -> list[Tally]:
    """Do several jobs, each in a process of its own.

    Args:
        jobs: one a process.
        given: what all of them are given, the images of the set.
        report: called here with what every process reports, see `work`.
        do: called in the process with its job, what is given, and what to report to; a function of a module.

    Returns:
        The tally of each job.

    Raises:
        RepaError: the first process that failed or was killed; the others are stopped, and what is committed
            stays.
    """
    context = multiprocessing.get_context("spawn")
    children: list[SpawnProcess] = []
    connections: dict[Connection, int] = {}
    try:
        with deaf_to_interrupts():
            for index, job in enumerate(jobs):
                here, there = context.Pipe(duplex=False)
                child = context.Process(
                    target=_child, args=(do, job, given, there, os.getpid()), name=f"repa-{index}"
                )
                child.start()
                there.close()
                children.append(child)
                connections[here] = index
        return _listen(jobs, children, connections, report)
    finally:
        _stop(children)
        for connection in connections:
            connection.close()


def _listen(
    jobs: Sequence[ProcessJob],
    children: Sequence[SpawnProcess],
    connections: Mapping[Connection, int],
    report: Report,
) -> list[Tally]:
    tallies: dict[int, Tally] = {}
    listening = dict(connections)
    while listening:
        for ready in wait(list(listening)):
            assert isinstance(ready, Connection)
            index = listening[ready]
            try:
                kind, *values = ready.recv()
            except (EOFError, OSError):
                # only the child holds the other end: closed without a last word, it has been killed
                children[index].join(_GRACE_SECONDS)
                raise RepaError(_obituary(jobs[index], children[index].exitcode)) from None
            if kind == "report":
                report(*values)
            elif kind == "done":
                tallies[index] = values[0]
                del listening[ready]
            else:
                what, remedy = values
                raise RepaError(f"process {jobs[index].rank} of {jobs[index].world}: {what}", remedy)
    return [tallies[index] for index in range(len(jobs))]


def _obituary(job: ProcessJob, code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        how = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    else:
        how = f"ended with status {code}"
    return (
        f"process {job.rank} of {job.world} ({job.device}) {how}; what was committed is kept: "
        "run the same command again to resume"
    )


def _stop(children: Sequence[SpawnProcess]) -> None:
    """End what still runs at once, as a shard is there whole or not at all."""
    for child in children:
        if child.is_alive():
            child.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()
            child.join()


def _child(do: Callable[..., Tally], job: ProcessJob, given: Any, connection: Any, parent: int) -> None:
    """Do the job in a started process, and send a last word to its parent."""
    end_with_parent(parent)

    def report(*values: object) -> None:
        connection.send(("report", *values))

    with suppress(KeyboardInterrupt), terminated_as_interrupt():  # the parent ends the run, and says so
        try:
            connection.send(("done", do(job, given, report)))
        except RepaError as error:
            connection.send(("failed", error.what, error.remedy))
        except Exception as error:
            traceback.print_exc()
            connection.send(("failed", f"{type(error).__name__}: {error}", ""))
    connection.close()
    sys.stderr.flush()
    # threads that still compute would hold the process up
    os._exit(0)
