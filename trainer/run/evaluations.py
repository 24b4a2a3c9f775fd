"""Evaluations while training, of the averaged weights, by the code of `repa evaluate`."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import RepaError
from ..evaluation.feature_shards import IMAGE, image_hashes, repeated
from ..evaluation.measuring import Measured, figures_of
from ..evaluation.networks import BATCH, features_of
from ..sampling.generate import TrainedModel, conditions, generate
from ..sampling.settings import SamplerConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from lightning.pytorch import Trainer
    from numpy.typing import NDArray

    from ..config import TrainConfig
    from ..evaluation.measuring import Asked
    from ..evaluation.networks import FeatureNetwork
    from ..evaluation.references import Reference
    from ..models.base import Backbone
    from ..step.module import TrainingModule
    from .previews import LatentDecoder

    Arrays = dict[str, dict[str, NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What evaluations need from outside the trainer. The command line injects it.

    Attributes:
        asked: the metrics.
        reference: what samples are compared with.
        load: the networks by name, for a device; called once, before the first evaluation.
    """

    asked: tuple[Asked, ...]
    reference: Reference
    load: Callable[[torch.device], Mapping[str, FeatureNetwork]]


class Evaluations:
    """Figures of samples, a column of ``metrics.csv`` each, named ``<metric>@<number of samples>``.

    On a CPU one thread computes them, so that `repa evaluate` finds the same number to the last digit.

    Args:
        config: of the run.
        run: its folder.
        evaluator: networks and reference.
        decoder: latents to images.
        say: prints a line.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        evaluator: Evaluator,
        decoder: LatentDecoder,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._run = run
        self._evaluator = evaluator
        self._decoder = decoder
        self._say = say
        self._networks: Mapping[str, FeatureNetwork] | None = None
        self._real: Mapping[str, NDArray[np.float32]] = {}

    def __call__(self, trainer: Trainer, module: TrainingModule) -> dict[str, float]:
        """Sample, and return the figures on rank 0. Every rank must call it, and makes its share.

        What keeps figures from being computed is said, and training goes on.
        """
        problem: RepaError | None = None
        arrays: Arrays = {}
        try:
            with _one_thread(module.device), module.shards.whole(module.ema) as backbone:
                arrays = self._features(trainer, module, backbone)
        except RepaError as error:
            problem = error
        if module.sum_over_ranks(float(problem is not None)):
            self._say(f"no figures at step {trainer.global_step:,}: {problem or 'another rank has none'}")
            return {}
        if trainer.world_size > 1:
            for own in arrays.values():
                for name, values in own.items():
                    own[name] = _joined(values, trainer, module)
        if not trainer.is_global_zero:
            return {}
        try:
            return self._figures(arrays)
        except RepaError as error:
            self._say(f"no figures at step {trainer.global_step:,}: {error}")
            return {}

    def _features(self, trainer: Trainer, module: TrainingModule, backbone: Backbone) -> Arrays:
        """Return this rank's features by network and name, each ``[N, D]`` with zeros for other ranks'."""
        config = self._config
        if self._networks is None:
            self._networks = self._evaluator.load(module.device)
        model = TrainedModel(
            backbone=backbone,
            objective=module.objective,
            scale=None,
            latents=module.latents,
            autoencoder=None,
            autoencoder_sha256=None,
            autoencoder_random=False,
            steps=trainer.global_step,
            origin=self._run,
        )
        settings = SamplerConfig(
            solver=config.evaluate_solver,
            steps=config.evaluate_steps,
            shift=config.evaluate_shift,
            guidance=config.evaluate_guidance,
        )
        num = config.evaluate_num
        arrays: Arrays = {
            name: {
                **{key: np.zeros((num, width), np.float32) for key, width in network.widths.items()},
                IMAGE: np.zeros((num, 16), np.uint8),
            }
            for name, network in self._networks.items()
        }
        batches = range(trainer.global_rank * BATCH, num, trainer.world_size * BATCH)
        condition = conditions(backbone.y_embedder, num, seed=config.seed)
        latents = generate(model, condition, settings, seed=config.seed, batch_size=BATCH, batches=batches)
        for first, part in zip(batches, latents, strict=True):
            images = self._decoder.decode(part).permute(0, 2, 3, 1).cpu().numpy()
            for name, network in self._networks.items():
                for key, values in features_of(network, images, first=first).items():
                    arrays[name][key][first : first + len(values)] = values
                arrays[name][IMAGE][first : first + len(images)] = image_hashes(images)
        return arrays

    def _figures(self, arrays: Arrays) -> dict[str, float]:
        assert self._networks is not None
        evaluator = self._evaluator
        if not self._real:
            self._real = {name: evaluator.reference.cached_features(name) for name in self._networks}
        twice = repeated(next(iter(arrays.values()))[IMAGE])
        if twice is not None:
            raise RepaError(
                f"samples {twice[0]:,} and {twice[1]:,} are the same image",
                "train longer",
                field="evaluate_num",
            )
        measured = {
            name: Measured(
                samples={key: values for key, values in arrays[name].items() if key != IMAGE},
                reference={"pool": self._real[name]},
                statistics={},
                weights_sha256=network.weights_sha256,
                random_weights=network.random_weights,
            )
            for name, network in self._networks.items()
        }
        return {
            f"{figure.metric}@{figure.n}": figure.value for figure in figures_of(evaluator.asked, measured)
        }


def _joined(values: NDArray[Any], trainer: Trainer, module: TrainingModule) -> NDArray[Any]:
    """Add up the ranks' arrays, of which each number is not 0 on one rank at most."""
    whole = torch.from_numpy(values.astype(np.float32)).to(module.device)
    summed: torch.Tensor = trainer.strategy.reduce(whole, reduce_op="sum")
    return summed.cpu().numpy().astype(values.dtype)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
