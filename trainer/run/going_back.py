"""The way back to an older checkpoint, which sets aside once what came after it, and records that."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.storage.files import make_folder, os_errors, sync_folders, write_file
from ..step.checkpoints import checkpoints_of
from .callbacks import METRICS_FILE
from .starts import read_starts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_ASIDE = "set-aside"


def checkpoint_to_go_on_from(
    run: Path, from_step: int | None, say: Callable[[str], None]
) -> tuple[tuple[int, Path] | None, bool]:
    """Choose the checkpoint of a start.

    A scheduler gives the same command again and again: a run goes back to a step once, and on from its newest
    checkpoint after that.

    Args:
        run: folder of the run.
        from_step: ``--from-step``; None takes the newest.
        say: prints a line.

    Returns:
        Step and path of the checkpoint, None of a run that has none, and whether this start goes back.

    Raises:
        RepaError: there is no checkpoint of that step.
    """
    found = checkpoints_of(run)
    newest = max(found.items(), default=None)
    if from_step is None:
        return newest, False
    back = [start["from_step"] for start in read_starts(run) if start.get("from_step") is not None]
    if newest is not None and back[-1:] == [from_step]:
        if newest[0] > from_step:
            say(f"the run went back to step {from_step:,} before; it goes on from its newest checkpoint")
        return newest, False
    if from_step not in found:
        steps = ", ".join(map(str, found))
        raise RepaError(
            f"{run} has no checkpoint of step {from_step}",
            f"it has those of {steps}" if steps else "leave --from-step out, it has none",
            field="--from-step",
        )
    return (from_step, found[from_step]), True


def set_newer_aside(run: Path, step: int) -> str:
    """Move the checkpoints after a step, and a copy of the rows of metrics, into a folder of the run.

    The newest goes first: killed in between, the run still has a newest one that all others lead to.

    Args:
        run: folder of the run.
        step: the newest step that stays.

    Returns:
        Name of the folder.

    Raises:
        RepaError: the operating system refuses.
    """
    aside = run / f"{_ASIDE}-{len(read_starts(run))}"
    newer = {each: path for each, path in checkpoints_of(run).items() if each > step}
    with os_errors("write", aside):
        make_folder(aside, run)
        metrics = run / METRICS_FILE
        if metrics.exists() and not (aside / METRICS_FILE).exists():
            write_file(aside / METRICS_FILE, metrics.read_bytes(), run)
        for _, path in sorted(newer.items(), reverse=True):
            os.replace(path, aside / path.name)
            sync_folders(aside, run)
            sync_folders(path.parent, run)
    return aside.name
