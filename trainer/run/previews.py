"""Sample grids while training, of the same noise and labels every time, from the averaged weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from ...data.errors import RepaError
from ..sampling.pictures import make_grid, save_png
from ..sampling.sampler import sample, state_noises
from ..sampling.settings import SamplerConfig
from ..sampling.state import state_of
from ..step.randomness import generator_for
from .callbacks import Clock, StepCallback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning.pytorch import Trainer
    from torch import Tensor

    from ..config import TrainConfig
    from ..models.base import Backbone
    from ..step.module import TrainingModule
    from .loggers import Reports

FOLDER = "samples"


class LatentDecoder(Protocol):
    """What previews need of stage 1. The command line injects it."""

    def decode(self, latent: Tensor) -> Tensor:
        """Decode unscaled latents ``[B, C, h, w]`` to images uint8 ``[B, 3, H, W]``.

        Raises:
            RepaError: the decoder's weights cannot be had.
        """
        ...


class Previews(StepCallback):
    """Writes ``samples/step-….png`` from rank 0.

    Args:
        config: of the run.
        run: its folder.
        decoder: latents to images; None makes no previews.
        say: prints a line.
        clock: not to count the time of sampling.
        reports: tells the loggers.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        decoder: LatentDecoder | None,
        say: Callable[[str], None],
        clock: Clock,
        reports: Reports,
    ) -> None:
        super().__init__(config)
        self._run = run
        self._decoder = decoder
        self._say = say
        self._clock = clock
        self._reports = reports

    def on_step(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        """Sample and write a grid if one is due. Without a decoder it says so, once."""
        if not self.is_due(step, self.config.preview_every) or not module.predicts_after(step):
            return
        # every rank: weights that are cut are gathered from all
        with self._clock.paused(), module.shards.whole(module.ema) as network:
            if trainer.is_global_zero and self._decoder is not None:
                self._write(trainer, module, network, self._decoder, step)

    def _write(
        self,
        trainer: Trainer,
        module: TrainingModule,
        network: Backbone,
        decoder: LatentDecoder,
        step: int,
    ) -> None:
        try:
            images = decoder.decode(self._latents(trainer, module, network))
        except RepaError as error:
            self._say(f"no previews: {error}")
            self._decoder = None
            return
        grid = make_grid(images.permute(0, 2, 3, 1).cpu().numpy())
        save_png(grid, self._run / FOLDER / f"step-{step:08d}.png", self._run)
        self._reports.picture(FOLDER, np.asarray(grid), step)

    def _latents(self, trainer: Trainer, module: TrainingModule, network: Backbone) -> Tensor:
        """Sample unscaled latents ``[B, C, h, w]`` of the averaged weights.

        Noise and conditions are fixed.
        """
        count = self.config.preview_count
        noise = next(state_noises(self.config.seed, range(count), state_of(module.backbone.config)))
        draws = generator_for(self.config.seed, "preview condition")
        condition = network.y_embedder.previewed(count, draws)
        with trainer.precision_plugin.forward_context():
            latents = sample(
                network,
                module.objective,
                noise.to(module.device),
                condition.to(module.device),
                SamplerConfig(
                    solver=module.objective.preview_solver,
                    steps=self.config.preview_steps,
                    shift=self.config.preview_shift,
                    guidance=self.config.preview_guidance,
                ),
            )
        return module.latents.unscaled(latents.float())
