"""The one way a run ends before its last step, by a signal or when its time is up, saved by all ranks.

Lightning's own ways are not used. Its handler of SIGTERM ends a run without a checkpoint, its handler for
SLURM writes one of another kind, and its timer asks all ranks in every step.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from ...data.edge import printable
from ...data.errors import RepaError
from .callbacks import StepCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from ..config import TrainConfig
    from ..step.module import TrainingModule

MAX_TIME = "trainer.max_time"
# what a run may be stopped by; ranks send the position and take the largest, so the later one wins
_REASONS = (None, MAX_TIME, "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
_SIGNALS = {number: _REASONS.index(number.name) for number in map(signal.Signals.__getitem__, _REASONS[2:])}
# signals by which SLURM warns before its time limit, as asked for with sbatch --signal=USR1@90
_WARNINGS = ("SIGUSR1", "SIGUSR2")
_DURATION = re.compile(r"(\d+):(\d\d):(\d\d):(\d\d)")
_SCONTROL_SECONDS = 60
_MOST_STEPS = 100  # between two times that ranks tell one another


class Stop(StepCallback):
    """Finishes the step, has it saved and ends the run when a signal came or the time is up.

    Several ranks agree on the step: about once a second each tells the others whether it was asked to stop,
    and reads the answers one step later, so that no step waits. One process alone tells nobody anything. A
    second Ctrl-C stops at once.

    Must stand before the checkpoints.

    Args:
        config: of the run.

    Attributes:
        began: whether training has begun, all that a checkpoint holds being restored.

    Raises:
        RepaError: ``trainer.max_time`` is no duration.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        limit = duration(config.trainer.get("max_time"))
        self._deadline = None if limit is None else time.monotonic() + limit
        self._asked = 0
        self._agreed = 0
        self._heard: tuple[Tensor, Any] | None = None
        self._due = 0
        self._told = (0, time.monotonic())
        self.began = False

    @property
    def reason(self) -> str | None:
        """What ended the run, the name of a signal or ``trainer.max_time``, or None if nothing did."""
        return _REASONS[self._agreed]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, in place of Lightning, which has just begun to and puts back what was there before."""
        del pl_module
        self.began = True
        # Lightning would ask rank 0 before every micro-batch whether its handler heard SIGTERM, and wait for
        # the answer; that handler is replaced below
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        # Python allows handlers to be set in the main thread only
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._ask)

    def on_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        """Stop if somebody asked."""
        del module
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._asked = max(self._asked, _REASONS.index(MAX_TIME))
        self._agreed = self._asked if trainer.world_size == 1 else self._agree(trainer, step)
        if self._agreed:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear out the others, who tell of their last step too."""
        del trainer, pl_module
        self._listen()

    def _agree(self, trainer: Trainer, step: int) -> int:
        """Return what all ranks had heard by the step before, and tell them what this one has heard."""
        agreed = 0
        if self._heard is not None:
            agreed, interval = self._listen()
            self._due = self._told[0] + interval
        if step >= self._due:
            before, then = self._told
            self._told = step, time.monotonic()
            # the steps of a second, as this rank sees them; all take the largest, so that they speak in the
            # same step again
            interval = round((step - before) / max(self._told[1] - then, 1e-6)) if self._due else 1
            said = torch.tensor([self._asked, min(max(interval, 1), _MOST_STEPS)], dtype=torch.int32)
            heard = said.to(trainer.strategy.root_device, non_blocking=True)
            self._heard = heard, distributed.all_reduce(heard, distributed.ReduceOp.MAX, async_op=True)
        return agreed

    def _listen(self) -> tuple[int, int]:
        """Return what was asked of any rank, and the steps until they tell one another again."""
        if self._heard is None:
            return 0, 1
        heard, work = self._heard
        self._heard = None
        work.wait()
        asked, interval = heard.tolist()
        return asked, interval

    def _ask(self, number: int, frame: Any) -> None:
        del frame
        # the first is noted, the second does not wait for the step
        if number == signal.SIGINT and self._asked >= _SIGNALS[signal.SIGINT]:
            raise KeyboardInterrupt
        self._asked = max(self._asked, _SIGNALS[signal.Signals(number)])


def _nothing() -> None:
    """Stand for what is not needed."""


def duration(value: Any) -> float | None:
    """Return the seconds of ``trainer.max_time``, None without one.

    Args:
        value: ``DD:HH:MM:SS``, or a mapping as of `datetime.timedelta`, for example ``{hours: 11}``.

    Raises:
        RepaError: it is neither.
    """
    if value is None:
        return None
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    try:
        if match is not None:
            names = ("days", "hours", "minutes", "seconds")
            return timedelta(**dict(zip(names, map(int, match.groups()), strict=True))).total_seconds()
        if isinstance(value, dict) and value:
            return timedelta(**value).total_seconds()
    except (TypeError, OverflowError):
        pass
    raise RepaError(
        f"{MAX_TIME}={value} is no duration",
        # without the zero YAML reads 12:00:00:00 as a number to the base of 60
        "write DD:HH:MM:SS with a zero in front, as 00:11:30:00, or {hours: 11}",
        field=MAX_TIME,
    )


def say_stopped(step: int, of: int, reason: str | None, say: Callable[[str], None]) -> None:
    """Say where a run stopped and that it goes on, and have its job of SLURM do so.

    Args:
        step: the last one, of which there is a checkpoint.
        of: steps that the run was to make.
        reason: see `Stop.reason`.
        say: prints a line.
    """
    by = f" by {reason}" if reason else ""
    say(f"stopped{by} at step {step:,} of {of:,}, saved; the same command goes on from there")
    requeue(reason, os.environ, say)


def requeue(reason: str | None, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Put the job of SLURM that this run is back into the queue, where SLURM warned of the end of its time.

    Args:
        reason: what stopped the run.
        environment: variables of the process.
        say: prints a line.
    """
    job = environment.get("SLURM_JOB_ID")
    if reason not in _WARNINGS or job is None:
        return
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job],
            capture_output=True,
            text=True,
            timeout=_SCONTROL_SECONDS,
            check=False,
        )
        problem = "" if done.returncode == 0 else done.stderr or f"scontrol ended with {done.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem:
        reason = printable(" ".join(problem.split()))
        say(f"note: job {job} is not requeued ({reason}): submit it again")
    else:
        say(f"job {job} is requeued")
