"""Trackio as a logger of Lightning, which has none."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray


class TrackioLogger(Logger):
    """Sends values and pictures to a run of Trackio, on this machine or where its environment says.

    Args:
        project: name of Trackio's project.
        name: of the run; one that is there already goes on.
    """

    def __init__(self, *, project: str, name: str) -> None:
        super().__init__()
        self._project = project
        self._run_name = name
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        """Name of the project, as Lightning's other loggers have it."""
        return self._project

    @property
    def version(self) -> str:
        """Name of the run."""
        return self._run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, begun when it is first asked for."""
        if self._run is None:
            self._run = _trackio().init(
                project=self._project,
                name=self._run_name,
                resume="allow",
                config=self._config,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the configuration, which goes with the run when it begins."""
        del args, kwargs
        self._config = dict(params if isinstance(params, dict) else vars(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send values of a step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_image(self, key: str, images: list[NDArray[np.uint8]], step: int | None = None) -> None:
        """Send pictures ``[H, W, 3]`` of a step."""
        for image in images:
            self.experiment.log({key: _trackio().Image(image)}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run, once all it was sent is written."""
        del status
        if self._run is not None:
            _trackio().finish()
            self._run = None


def _trackio() -> Any:
    # it takes seconds to import, and has no types where it is not installed
    return import_module("trackio")
