"""Jobs in processes of their own, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, TypeVar

from ...data.errors import RepaError
from ...pipeline.shard_loop.interrupts import terminated_as_interrupt
from ...pipeline.shard_loop.processes import deaf_to_interrupts, end_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.context import SpawnProcess

    Report = Callable[[int], None]

Job = TypeVar("Job")
_GRACE_SECONDS = 5.0


def in_processes(
    do: Callable[[Job, Report], None], jobs: Sequence[Job], report: Report, *, what: str
) -> None:
    """Do several jobs, each in a process of its own.

    Args:
        do: a function of a module, which takes a job and what to report counts to.
        jobs: one a process; they can be pickled.
        report: called here with each count that a process reports.
        what: what a process does, for names and errors, as ``sampling``.

    Raises:
        RepaError: of the first process that failed or was killed; the others are stopped, and what is written
            stays.
    """
    context = multiprocessing.get_context("spawn")
    children: list[SpawnProcess] = []
    listening: dict[Connection, int] = {}
    try:
        with deaf_to_interrupts():
            for number, job in enumerate(jobs):
                here, there = context.Pipe(duplex=False)
                child = context.Process(
                    target=_child, args=(do, job, there, os.getpid()), name=f"{what}-{number}"
                )
                child.start()
                there.close()
                children.append(child)
                listening[here] = number
        while listening:
            for ready in wait(list(listening)):
                assert isinstance(ready, Connection)
                number = listening[ready]
                if _hear(ready, f"{what} process {number}", children[number], report):
                    del listening[ready]
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
        for child in children:
            child.join(_GRACE_SECONDS)
            if child.is_alive():
                child.kill()


def _hear(connection: Connection, who: str, child: SpawnProcess, report: Report) -> bool:
    """Take what a process says, and tell whether that was its last word.

    Raises:
        RepaError: it failed, or was killed without a word.
    """
    try:
        kind, *values = connection.recv()
    except (EOFError, OSError):
        child.join(_GRACE_SECONDS)
        raise RepaError(
            f"{who} ended with status {child.exitcode}",
            "the same command goes on with what is missing",
            field="--devices",
        ) from None
    if kind == "failed":
        what, remedy, field = values
        raise RepaError(f"{who}: {what}", remedy, field=field)
    if kind == "report":
        report(*values)
    return bool(kind == "done")


def _child(do: Callable[[Any, Report], None], job: Any, connection: Any, parent: int) -> None:
    """Do the job in a started process, and send a last word to its parent."""
    end_with_parent(parent)
    with suppress(KeyboardInterrupt), terminated_as_interrupt():
        try:
            do(job, lambda count: connection.send(("report", count)))
            connection.send(("done",))
        except RepaError as error:
            connection.send(("failed", error.what, error.remedy, error.field))
        except Exception as error:
            traceback.print_exc()
            connection.send(("failed", f"{type(error).__name__}: {error}", "", ""))
    connection.close()
