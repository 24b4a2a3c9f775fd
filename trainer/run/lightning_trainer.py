"""Lightning's trainer as a run configures it, and what of its talk tells the user nothing."""

from __future__ import annotations

import logging
import re
import signal
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from ...data.edge import printable
from ...data.errors import RepaError
from ...data.launchers import launched_world
from ..step.checkpoints import FOLDER, AtomicCheckpointIO
from .arithmetic import device_kind, resolve_precision
from .launch import environments, launched_devices
from .sharded_strategy import NAME as FSDP
from .sharded_strategy import ShardedStrategy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger

    from ..config import TrainConfig
    from .stop import Stop

_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_SHOWN = 200  # characters of a library's reason
# what gloo and NCCL say when the process at the other end is gone
_GONE = re.compile(r"Connection \w+ by peer|remote process exited")


def make_trainer(
    config: TrainConfig,
    *,
    run: Path | None = None,
    callbacks: Iterable[Callback] = (),
    loggers: Sequence[Logger] = (),
) -> Trainer:
    """Return the trainer of a run, on the launcher's processes, else on ``trainer.devices`` or one device.

    Raises:
        RepaError: Lightning refuses the devices, the strategy or the precision, or the launcher has started
            other processes than the settings say.
    """
    world = launched_world()
    settings = {**config.trainer, **launched_devices(config.trainer, world)}
    plugins = settings.pop("plugins", None) or []
    # names, which the run makes callbacks of
    settings.pop("callbacks", None)
    # `Stop` minds the time: Lightning's timer asks all ranks in every step, and saves nothing
    settings.pop("max_time", None)
    _check_precision(config)
    if settings.get("strategy") == FSDP:
        settings["strategy"] = ShardedStrategy()
    try:
        with quiet_lightning():
            trainer = Trainer(
                **settings,
                precision=resolve_precision(config),
                max_epochs=-1,
                max_steps=config.max_steps,
                accumulate_grad_batches=config.accumulate,
                callbacks=list(callbacks),
                logger=list(loggers) or False,
                # of what callbacks from outside log
                log_every_n_steps=config.log_every,
                plugins=[*plugins, AtomicCheckpointIO(), *environments(world)],
                # where Lightning would look for a checkpoint of its own
                default_root_dir=None if run is None else run / FOLDER,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        line = " ".join(str(error).split())
        raise RepaError(
            f"Lightning refuses these settings: {line}", "change --set trainer.…", field="trainer"
        ) from error
    if world is not None and trainer.world_size != world.size:
        raise RepaError(
            f"{world.launcher} started {world.size} processes, and with these settings {trainer.world_size} "
            "would train together",
            "change --set trainer.…, or start as many",
            field="trainer",
        )
    return trainer


def begin_at(trainer: Trainer, step: int) -> None:
    """Have a trainer that has not begun count its steps from another than 0."""
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    steps.increment_by(step)


def _check_precision(config: TrainConfig) -> None:
    device = device_kind(config)
    if config.precision == "16-mixed" and device == "cpu":
        raise RepaError(
            "precision 16-mixed needs a GPU and the run is on the CPU",
            "--set precision=bf16-mixed or 32-true",
            field="precision",
        )
    if config.precision == "bf16-mixed" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise RepaError(
            "precision bf16-mixed is not computed by this GPU", "--set precision=16-mixed", field="precision"
        )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide what Lightning says of every run, of devices that are not there, of tips, of where it stopped."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # this run is told which devices to use, and has no dataloader workers
            for message in (
                r"(GPU|MPS|TPU) available but not used",
                r"The '?\w*_dataloader'? does not have many workers",
                # of a batch script or a login node that trains in one process
                r"The `srun` command is available on your system but is not used",
                # the timer's of a run by a version that left the time to Lightning
                r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
                # queries and keys that a block returns are views, which nobody changes in place
                r"FSDP2-wrapped module",
                # Lightning's own use of torch's pytree
                r"`isinstance\(treespec, LeafSpec\)` is deprecated",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def other_ranks() -> Iterator[None]:
    """Print one line where a rank stops because another has. What that one printed is the cause.

    Raises:
        RepaError: in place of the error of a collective whose other end is gone.
    """
    try:
        yield
    except RuntimeError as error:
        found = _GONE.search(str(error))
        if found is None:
            raise
        raise RepaError(
            f"another process of this run has ended ({found.group()})",
            "mend what it printed, then the same command goes on",
        ) from error


@contextmanager
def at_once(trainer: Trainer) -> Iterator[None]:
    """End the processes that Lightning started when this one ends on an error, and pass Ctrl-C on as it is.

    Lightning makes an exit with status 1 of Ctrl-C, and lets its other processes wait for this one on errors.

    Raises:
        KeyboardInterrupt: in place of that exit.
    """
    try:
        yield
    except BaseException as error:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


@contextmanager
def restoring(checkpoint: Path | None, stop: Stop) -> Iterator[None]:
    """Make one line of what Lightning and torch say of a checkpoint that they cannot restore.

    Args:
        checkpoint: that is restored; None where there is none.
        stop: knows whether training has begun.

    Raises:
        RepaError: in place of any other error but of the system or its memory, before training has begun.
    """
    try:
        yield
    except (RepaError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if checkpoint is None or stop.began or _GONE.search(str(error)):
            raise
        reason = printable(" ".join(str(error).split()))[:_SHOWN]
        raise RepaError(
            f"{checkpoint} cannot be restored ({type(error).__name__}: {reason})",
            "go on from an older one with --from-step",
            field="--from-step",
        ) from error
