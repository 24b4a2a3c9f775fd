"""Checkpoints kept, the newest few and the milestones, each whole or not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..added_callbacks import check_state
from ..step.checkpoints import FOLDER, checkpoint_path, checkpoints_of
from ..step.sharding import own_part
from .callbacks import Clock, StepCallback
from .divergence import refuse_divergence, refuse_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning.pytorch import Trainer

    from ..config import TrainConfig
    from ..step.module import TrainingModule


class Checkpoints(StepCallback):
    """Saves every ``checkpoint_every`` steps, after the last one and when asked to stop.

    What a phase begins afresh from is saved and kept too, for other runs can begin there.

    Must be the last callback: what the others do in a step has to be in the checkpoint.

    Args:
        config: of the run.
        run: its folder.
        clock: not to count the time of saving.
        before: makes durable what the checkpoint counts on.
    """

    def __init__(self, config: TrainConfig, run: Path, clock: Clock, before: Callable[[], None]) -> None:
        super().__init__(config)
        self._run = run
        self._clock = clock
        self._before = before

    def on_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        """Save if it is time.

        Raises:
            RepaError: training has diverged, so that the last good checkpoint stays; a callback keeps a state
                that could not be read again; or the disk refuses.
        """
        handed_over = module.fresh_starts()
        due = self.is_due(step, self.config.checkpoint_every) or step in handed_over
        if not due and not trainer.should_stop:
            return
        with self._clock.paused():
            module.fetch_means()
            refuse_divergence(module.means.state_dict()["sums"], step, self._run)
            refuse_weights(map(own_part, module.parameters()), step, self._run, module.over_ranks)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                check_state(type(callback).__name__, callback.state_dict())
            self._before()
            trainer.save_checkpoint(checkpoint_path(self._run, step))
            if trainer.is_global_zero:
                self.prune(handed_over)

    def prune(self, kept: frozenset[int]) -> None:
        """Keep the newest ``keep_last`` and the multiples of ``keep_every``, and remove half files.

        Args:
            kept: steps whose checkpoints are kept as well.
        """
        milestone = self.config.keep_every
        found = checkpoints_of(self._run)
        for step in list(found)[: -self.config.keep_last]:
            if step not in kept and (not milestone or step % milestone):
                found[step].unlink(missing_ok=True)
        for partial in (self._run / FOLDER).glob(".*.partial"):
            partial.unlink(missing_ok=True)
