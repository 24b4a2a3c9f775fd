"""The loggers that a run reports to beside its own files, through Lightning's.

``metrics.csv`` is written whatever happens to them: a logger that fails while training goes on without it.
"""

from __future__ import annotations

import csv
import os
import secrets
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ...data.edge import printable
from ...data.errors import RepaError
from ...data.storage.files import make_folder, os_errors
from ..methods.base import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from lightning.pytorch.loggers import CSVLogger, Logger
    from numpy.typing import NDArray

    from ..config import TrainConfig

PROJECT = "repa"
PACKAGES: Mapping[str, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Logger → the package it needs, which is also the extra that brings it. ``csv`` needs none."""

REMOTE = ("wandb", "trackio")
"""Those that know a run by an id of their own."""

_SHOWN = 200  # characters of a library's reason


def logger_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield a problem for each logger whose package is not installed."""
    for name in dict.fromkeys(config.loggers):
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            yield Problem(
                what=f"the logger {name} needs {PACKAGES[name]}, which is not installed",
                remedy=f"install it with `pip install 'repa[{name}]'`, or leave it out of loggers",
                field="loggers",
            )


def logger_ids(
    config: TrainConfig, starts: Sequence[Mapping[str, Any]], *, anew: bool = False
) -> dict[str, str]:
    """Return the id of the run for each logger that wants one, the same at every start.

    Args:
        config: of the run.
        starts: what is recorded of its starts so far.
        anew: whether the run went back to an earlier step, from where it is another curve.
    """
    known: dict[str, str] = {}
    for start in () if anew else starts:
        known |= start.get("loggers") or {}
    return {name: known.get(name) or secrets.token_hex(4) for name in REMOTE if name in config.loggers}


def make_loggers(
    config: TrainConfig, run: Path, ids: Mapping[str, str], *, resumed: int, leader: bool
) -> list[Logger]:
    """Return the loggers of a run. None of them has begun but ``csv``, which takes up its rows.

    Args:
        config: of the run, whose packages are installed.
        run: its folder.
        ids: of `logger_ids`.
        resumed: step that the run goes on from; of what came after it nothing is shown, where a logger can.
        leader: whether this is rank 0, which alone writes.

    Raises:
        RepaError: a folder of theirs cannot be made, or is a link to elsewhere.
    """
    from lightning.pytorch import loggers

    made: list[Logger] = []
    for name in dict.fromkeys(config.loggers):
        if leader and name != "trackio":
            with os_errors("write", run / name):
                make_folder(run / name, run)
        if name == "csv":
            made.append(_continued_csv(run, resumed, leader=leader))
        elif name == "tensorboard":
            # in run/tensorboard, as ever
            logger = loggers.TensorBoardLogger(run, name="", version="tensorboard", purge_step=resumed + 1)
            made.append(logger)
        elif name == "wandb":
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            made.append(loggers.WandbLogger(name=run.name, save_dir=run, project=project, id=ids[name]))
        else:
            from .trackio_logger import TrackioLogger

            project = os.environ.get("TRACKIO_PROJECT", PROJECT)
            made.append(TrackioLogger(project=project, name=f"{run.name}-{ids[name]}"))
    return made


def _continued_csv(run: Path, resumed: int, *, leader: bool) -> CSVLogger:
    """Return Lightning's CSV logger with the rows up to a step, which by itself it would delete."""
    from lightning.pytorch.loggers import CSVLogger

    file = run / "csv" / "metrics.csv"
    if file.is_symlink():
        raise RepaError(f"{file} is a link", "remove it", field="loggers")
    rows: list[dict[str, Any]] = []
    if leader and resumed and file.exists():
        with file.open(newline="", encoding="utf-8", errors="replace") as lines:
            # a last line that a kill has cut off has no whole step, or no last cell
            rows = [
                {key: cell for key, cell in row.items() if key and cell}
                for row in csv.DictReader(lines)
                if (row.get("step") or "").isdigit() and int(row["step"]) <= resumed
            ]
    logger = CSVLogger(run, name="", version="csv", flush_logs_every_n_steps=1)
    if leader:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
            logger.experiment.metrics.extend(rows)
        logger.save()
    return logger


class Reports:
    """What rank 0 tells the loggers of a run, each by itself.

    Args:
        config: of the run.
        say: prints a line.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._loggers: list[Logger] = []

    @contextmanager
    def begun(self, loggers: Sequence[Logger]) -> Iterator[None]:
        """Begin the run in each logger, or go on with it, send the configuration, and end it behind.

        Raises:
            RepaError: one cannot begin, as without an account or network.
        """
        try:
            self._begin(loggers)
            yield
        finally:
            # what is sent until then is written, and no other run of this process goes on with this one
            self._each(_end)
            self._loggers = []

    def _begin(self, loggers: Sequence[Logger]) -> None:
        logger: Any  # what an `experiment` is differs
        for logger in loggers:
            try:
                logger.log_hyperparams(self._config.to_dict())
                if name_of(logger) == "tensorboard":
                    text = "".join(f"    {line}\n" for line in self._config.to_yaml().splitlines())
                    logger.experiment.add_text("config", text)
                else:
                    logger.experiment  # noqa: B018 - Lightning begins a run when it is first looked at
            except Exception as error:  # of any library and service
                raise RepaError(
                    f"the logger {name_of(logger)} cannot begin ({_reason(error)})",
                    f"{_REMEDIES[name_of(logger)]}, or leave it out of loggers",
                    field="loggers",
                ) from error
            self._loggers.append(logger)

    def values(self, values: Mapping[str, float], step: int) -> None:
        """Send the values of a step."""
        if values:
            self._each(lambda logger: logger.log_metrics(dict(values), step))

    def picture(self, name: str, picture: NDArray[np.uint8], step: int) -> None:
        """Send a picture ``[H, W, 3]`` to those that show pictures."""
        self._each(lambda logger: _send_picture(logger, name, picture, step))

    def _each(self, action: Callable[[Logger], None]) -> None:
        for logger in list(self._loggers):
            try:
                action(logger)
            except Exception as error:  # of any library and service
                self._loggers.remove(logger)
                self._say(f"note: the run goes on without {name_of(logger)}, which failed ({_reason(error)})")


_REMEDIES: Mapping[str, str] = {
    "csv": "make its folder writable",
    "tensorboard": "make its folder writable",
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "trackio": "make TRACKIO_DIR a writable folder",
}


def name_of(logger: Logger) -> str:
    """Return the name of a logger, as in the setting ``loggers``."""
    return type(logger).__name__.removesuffix("Logger").lower()


def _send_picture(logger: Any, name: str, picture: NDArray[np.uint8], step: int) -> None:
    kind = name_of(logger)
    if kind == "tensorboard":
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif kind != "csv":
        logger.log_image(name, [picture], step)


def _end(logger: Any) -> None:
    logger.finalize("success")
    if name_of(logger) == "wandb":
        # Lightning leaves it open, and the next run of this process would go on with it
        logger.experiment.finish()


def _reason(error: Exception) -> str:
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))[:_SHOWN]
