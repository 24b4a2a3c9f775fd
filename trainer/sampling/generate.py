"""Samples of a trained model: which weights, which noise, and latents in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError
from ...data.reading.latents import LatentScale, scale_of, unscale_latent
from ..models import registry as backbones
from ..models.conditioning import ConditionColumn
from ..models.published import WEIGHTS
from ..objectives import registry as objectives
from ..step.checkpoints import checkpoints_of, load_checkpoint, objective_said
from ..step.module import CHECKPOINT_KEY
from ..typed import from_mapping
from .sampler import SamplerConfig, sample, sample_noises

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from ..models.base import Backbone
    from ..objectives.base import Objective

STABLE_DIFFUSION_SCALE = LatentScale(0.18215)


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A backbone and what sampling must know of its training.

    Attributes:
        backbone: the network, in eval mode.
        objective: what it was trained to predict.
        scale: from the autoencoder's latent to the backbone's.
        autoencoder: name or folder of the autoencoder that made the latents; None if the file does not say.
        autoencoder_sha256: hash of its weights; None if the file does not say.
        autoencoder_random: whether its weights were drawn.
        steps: training steps it had; None if the file does not say.
        origin: the file, for messages.
    """

    backbone: Backbone
    objective: Objective
    scale: LatentScale
    autoencoder: str | None
    autoencoder_sha256: str | None
    autoencoder_random: bool
    steps: int | None
    origin: Path

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, h, w)`` of one latent."""
        return self.backbone.config.latent_shape


def model_of_run(run: Path, *, weights: str = "ema") -> TrainedModel:
    """The model of a run's newest checkpoint.

    Raises:
        RepaError: the folder holds no checkpoint, or a damaged one.
    """
    found = checkpoints_of(run)
    if not found:
        raise RepaError(
            f"{run} holds no checkpoint", f"train with `repa train --run {run}`, or name another --run"
        )
    return model_of_file(found[max(found)], weights=weights)


def model_of_file(file: Path, *, weights: str = "ema") -> TrainedModel:
    """The model of a checkpoint file: one of ours, or a published one of SiT or REPA.

    A published file that does not name its path was trained on the linear one, and its latents were scaled as
    those of Stable Diffusion.

    Raises:
        RepaError: unknown weights, or no checkpoint of a backbone.
    """
    if weights not in WEIGHTS:
        raise RepaError(f"weights {weights!r} are unknown", f"choose {' or '.join(WEIGHTS)}")
    ours = _checkpoint_of_a_run(file)
    if ours is not None:
        return _model_of(ours, file, weights)
    objective, published = backbones.load_any_published(file, weights=weights)
    return TrainedModel(
        backbone=published.build().float(),
        objective=objectives.from_plain({"name": objective, **published.objective}),
        scale=STABLE_DIFFUSION_SCALE,
        autoencoder=None,
        autoencoder_sha256=None,
        autoencoder_random=False,
        steps=published.steps,
        origin=file,
    )


def generate(
    model: TrainedModel,
    condition: Tensor,
    settings: SamplerConfig,
    *,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Unscaled latents of the samples, in batches.

    The noise of sample i depends on seed and i alone, so the batch size changes no sample beyond the rounding
    of the matrix products.

    Args:
        model: what to sample.
        condition: of each sample ``[N, …]``; for labels int64 ``[N]``.
        settings: solver, steps and guidance.
        seed: of the noise.
        batch_size: samples of a batch.
        progress: called with the number of solver steps of the batch that are done.

    Yields:
        float32 ``[B, C, h, w]`` on the model's device.
    """
    device = next(model.backbone.parameters()).device
    for first in range(0, len(condition), batch_size):
        part = condition[first : first + batch_size]
        noises = sample_noises(seed, range(first, first + len(part)), model.latent_shape)
        latents = sample(
            model.backbone,
            model.objective,
            next(noises).to(device),
            part.to(device),
            solver=settings.solver,
            steps=settings.steps,
            guidance=settings.guidance,
            interval=settings.interval,
            noises=noises,
            progress=progress,
        )
        yield unscale_latent(latents.float(), *model.scale)


def _checkpoint_of_a_run(file: Path) -> Mapping[str, Any] | None:
    """The checkpoint, if it is one of ours; what else the file may be, the published loader says."""
    if file.suffix == ".safetensors":
        return None
    try:
        return load_checkpoint(file)
    except RepaError:
        return None


def _model_of(checkpoint: Mapping[str, Any], file: Path, weights: str) -> TrainedModel:
    said = checkpoint[CHECKPOINT_KEY]
    prefix = "ema." if weights == "ema" else "backbone."
    state = {
        key.removeprefix(prefix): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(prefix)
    }
    condition = said.get("condition")
    try:
        conditioner = None if condition is None else from_mapping(ConditionColumn, condition).build()
        backbone = backbones.load(backbones.from_plain(said["backbone"]), state, conditioner)
    except RepaError as error:
        raise RepaError(f"{file}: {error.what}", error.remedy, field=error.field) from error
    latent = said["latent"]
    return TrainedModel(
        backbone=backbone.eval().requires_grad_(False),
        objective=objectives.from_plain(objective_said(said)),
        scale=scale_of(latent, where=f"checkpoint {file}", remedy="it cannot be sampled", error=RepaError),
        autoencoder=latent["autoencoder"],
        autoencoder_sha256=latent["weights_sha256"],
        autoencoder_random=latent["random_weights"],
        steps=checkpoint["global_step"],
        origin=file,
    )
