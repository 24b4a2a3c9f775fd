"""The callbacks between steps, for rows of metrics, the held-out loss, the loggers and the console."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.callbacks import Callback
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ...data.units import counted, human_seconds
from .divergence import refuse_divergence
from .metrics import MetricsFile
from .timing import Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from lightning.pytorch import LightningModule, Trainer
    from rich.console import Console
    from rich.progress import TaskID

    from ..config import TrainConfig
    from ..step.module import TrainingModule
    from .loggers import Reports
    from .utilisation import Utilisation

    Evaluate = Callable[[Trainer, TrainingModule], dict[str, float]]

METRICS_FILE = "metrics.csv"
_PLAIN_LINE_SECONDS = 15.0


class StepCallback(Callback):
    """A callback that acts after whole optimiser steps, not after micro-batches.

    Args:
        config: of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call `on_step` after the last micro-batch of a step."""
        del outputs, batch_idx
        if batch.micro == self.config.accumulate - 1:
            self.on_step(trainer, cast("TrainingModule", pl_module), trainer.global_step)

    def on_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        """Act after `step` finished steps."""

    def is_due(self, step: int, every: int) -> bool:
        """Tell whether something that happens every so many steps, and after the last, happens now."""
        return bool(every) and (step % every == 0 or step == self.config.max_steps)


class Metrics(StepCallback):
    """Rows of ``metrics.csv`` and ``timing.csv``, the loggers, and the bar or the lines of the console.

    Wall-clock times have a file of their own, so that ``metrics.csv`` of a run that was killed and resumed is
    byte for byte that of an undisturbed one.

    Args:
        config: of the run.
        run: its folder.
        console: where to show progress.
        clock: measures the rate.
        evaluations: what is measured beside training values, each with the steps between its values.
        reports: tells the loggers.
        bytes_read: bytes that this process has read from the cache so far; None where nobody counts them.
        utilisation: tells the MFU; None where it is not known.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        console: Console,
        clock: Clock,
        evaluations: Sequence[tuple[int, Evaluate]],
        reports: Reports,
        bytes_read: Callable[[], int] | None = None,
        utilisation: Utilisation | None = None,
    ) -> None:
        super().__init__(config)
        self._run = run
        self._console = console
        self._evaluations = evaluations
        self._bytes_read = bytes_read
        self._utilisation = utilisation
        self._timing: Timing | None = None
        self._file: MetricsFile | None = None
        self._reports = reports
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._clock = clock
        self._last_line = 0.0
        self._rows_before: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return how many rows a checkpoint counts on."""
        return {"rows": 0 if self._file is None else len(self._file)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take how many rows there were."""
        rows = state_dict.get("rows")
        self._rows_before = rows if isinstance(rows, int) else None

    def sync(self) -> None:
        """Have the rows outlive a power cut.

        Raises:
            RepaError: the disk refuses.
        """
        if self._file is not None:
            self._file.sync()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file, dropping rows that a killed run wrote after its last checkpoint."""
        module = cast("TrainingModule", pl_module)
        self._clock.restart(trainer.global_step)
        self._timing = Timing(
            self._run, module.device, trainer.world_size, self._bytes_read, module.sum_over_ranks
        )
        if not trainer.is_global_zero:
            return
        self._timing.open()
        self._file = MetricsFile(
            self._run / METRICS_FILE, resumed_step=trainer.global_step, rows=self._rows_before
        )
        if self._file.missing:
            self._console.print(
                f"note: {METRICS_FILE} lacks {counted(self._file.missing, 'row')} of before this start",
                highlight=False,
                soft_wrap=True,
            )
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(
                "training", total=self.config.max_steps, completed=trainer.global_step, note=""
            )
            self._bar.start()

    def on_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        """Write a row if one is due."""
        values: dict[str, float] = {}
        log = self.is_due(step, self.config.log_every)
        if log:
            values |= module.take_means()
            refuse_divergence(values, step, self._run)
        rate = self._clock.rate(step, self.config.batch_size) if log else None
        for every, evaluate in self._evaluations:
            if self.is_due(step, every) and module.predicts_after(step):
                with self._clock.paused():
                    values |= evaluate(trainer, module)
        if values and self._file is not None:
            self._file.write(step, values)
        cost: dict[str, float] = {}
        if rate is not None and self._timing is not None:
            cost = self._timing.values(rate)
            if self._utilisation is not None:
                cost["mfu"] = self._utilisation.at(step, rate)
            self._timing.write(step, cost)
        if trainer.is_global_zero:
            self._reports.values(values | cost, step)
            self._show(step, values, cost)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away, close what is open."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bar away, close what is open."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, step: int, values: Mapping[str, float], cost: Mapping[str, float]) -> None:
        note = progress_note(values, cost)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)
            if note:
                self._bar.update(self._task, note=note)
        elif note and (
            time.monotonic() - self._last_line > _PLAIN_LINE_SECONDS or step == self.config.max_steps
        ):
            self._last_line = time.monotonic()
            left = time_left(self.config, step, cost)
            self._console.print(
                f"step {step:,}/{self.config.max_steps:,}  {note}{left}", highlight=False, soft_wrap=True
            )


def progress_note(values: Mapping[str, float], cost: Mapping[str, float]) -> str:
    """Return the losses, the rate and, where it is known, the MFU of a step in one line.

    Args:
        values: a row of metrics.csv.
        cost: a row of timing.csv, or nothing.
    """
    parts = [
        f"{name.replace('_', ' ')} {value:.4f}"
        for name, value in values.items()
        if name in ("loss", "held_out_ema")
    ]
    note = " ".join(parts)
    if "images_per_second" in cost:
        note += f" · {cost['images_per_second']:,.1f} images/s"
    if "mfu" in cost:
        note += f" · MFU {cost['mfu']:.1%}"
    return note


def time_left(config: TrainConfig, step: int, cost: Mapping[str, float]) -> str:
    """Return how long the steps to come take at the rate of the last ones, nothing at the end."""
    rate = cost.get("images_per_second", 0.0)
    if step >= config.max_steps or rate <= 0:
        return ""
    return f" · {human_seconds((config.max_steps - step) * config.batch_size / rate)} left"


class Clock:
    """Images per second of training alone. Previews, evaluations and checkpoints are not counted."""

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, step: int) -> None:
        """Count from here."""
        self._start = time.perf_counter()
        self._step = step

    def rate(self, step: int, batch_size: int) -> float:
        """Return images per second since the last call."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        images = (step - self._step) * batch_size
        self.restart(step)
        return images / seconds

    def paused(self) -> Pause:
        """Leave the time in this context out of the count."""
        return Pause(self)


class Pause:
    """Moves a clock's start by the time spent inside."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entered = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._clock._start += time.perf_counter() - self._entered
