"""Samples of a trained model, by choice of weights and noise, as latents in batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...data.edge import printable
from ...data.errors import RepaError
from ...data.reading.latents import LatentScale, scale_of
from ..models import registry as backbones
from ..models.conditioning import ConditionColumn, LabelConditioner, balanced_labels
from ..models.conditions import build_conditioner
from ..models.published import FAMILY
from ..models.published_file import WEIGHTS
from ..objectives import registry as objectives
from ..step.checkpoints import SOFTREPA_FILE, checkpoints_of, objective_said, own_checkpoint
from ..step.latents import NAME, TOKENS, MomentLatents, TokenLatents, TokenSource
from ..step.module import CHECKPOINT_KEY
from ..step.randomness import generator_for
from ..typed import from_mapping
from .sampler import sample, state_noises
from .state import state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..models.base import Backbone
    from ..models.conditioning import Conditioner
    from ..objectives.base import Objective
    from ..step.latents import Latents
    from .settings import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A backbone and what sampling must know of its training.

    Attributes:
        backbone: the network, in eval mode.
        objective: what it was trained to predict.
        scale: from the autoencoder's latent to the backbone's; None if the file does not say, or if it makes
            no latents of an autoencoder.
        autoencoder: name or folder of the autoencoder that made the latents; None if the file does not say.
        autoencoder_sha256: hash of its weights; None if the file does not say.
        autoencoder_random: whether its weights were drawn.
        steps: training steps it had; None if the file does not say.
        class_names: of the classes, by number; empty if the file does not say.
        guidable: whether it was trained without its condition at times, which guidance needs.
        origin: the file, for messages.
        images_seen: images of all its steps, each as often as it was seen; None if the file does not say.
        predicts: whether its prediction has been trained, which a warm-up of first blocks leaves out.
        condition_weights_sha256: of the encoder whose vectors or states it is conditioned on; None for
            labels, or if the file does not say.
        condition_random_weights: whether that encoder's weights were drawn.
        latents: what it makes, where that is known without `scale`.
        tokens: whose tokens it makes; None of one that makes latents of an autoencoder.
    """

    backbone: Backbone
    objective: Objective
    scale: LatentScale | None
    autoencoder: str | None
    autoencoder_sha256: str | None
    autoencoder_random: bool
    steps: int | None
    origin: Path
    class_names: tuple[str, ...] = ()
    guidable: bool = True
    images_seen: int | None = None
    predicts: bool = True
    condition_weights_sha256: str | None = None
    condition_random_weights: bool = False
    latents: Latents | None = None
    tokens: TokenSource | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, h, w)`` of one latent."""
        return self.backbone.config.latent_shape

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null class."""
        return self.backbone.config.num_classes


def model_of_run(run: Path, *, weights: str = "ema") -> TrainedModel:
    """Return the model of a run's newest checkpoint.

    Raises:
        RepaError: the folder holds no checkpoint, or a damaged one.
    """
    return model_of_file(newest_checkpoint(run), weights=weights)


def newest_checkpoint(run: Path) -> Path:
    """Return the file of a run's newest checkpoint.

    Raises:
        RepaError: the folder holds none, or those of SoftREPA.
    """
    if (run / SOFTREPA_FILE).exists():
        raise RepaError(
            f"{run} is a run of SoftREPA, which trains no backbone",
            f"sample with `repa softrepa sample --run {run}`",
            field="--run",
        )
    found = checkpoints_of(run)
    if not found:
        raise RepaError(
            f"{run} holds no checkpoint",
            f"train with `repa train --run {run}`, or name another --run",
            field="--run",
        )
    return found[max(found)]


def model_of_file(file: Path, *, weights: str = "ema", family: str | None = None) -> TrainedModel:
    """Load the model of a checkpoint file, one of ours or a published one.

    A published file that does not name its path was trained on the linear one, and its latents were scaled as
    those of Stable Diffusion unless its family says otherwise.

    Args:
        file: the checkpoint.
        weights: ``ema`` or ``model``.
        family: of a published file that does not say what it is of; None of all others.

    Raises:
        RepaError: unknown weights, no checkpoint of a backbone, or of another family.
    """
    if weights not in WEIGHTS:
        raise RepaError(
            f"weights {weights!r} are unknown", f"choose {' or '.join(WEIGHTS)}", field="--weights"
        )
    ours = own_checkpoint(file)
    if ours is not None:
        if family is not None:
            raise RepaError(
                f"{file} is of a run, and says itself what it is", f"leave {FAMILY} out", field=FAMILY
            )
        return _model_of(ours, file, weights)
    objective, published = backbones.load_any_published(file, weights=weights, family=family)
    return TrainedModel(
        backbone=published.build().float(),
        objective=objectives.from_plain({"name": objective, **published.objective}),
        scale=published.scale,
        autoencoder=None,
        autoencoder_sha256=None,
        autoencoder_random=False,
        steps=published.steps,
        origin=file,
        guidable=published.condition is None or published.condition.drop > 0,
    )


def known_latents(model: TrainedModel) -> Latents:
    """Return what a model makes.

    Raises:
        RepaError: the model's file does not say it.
    """
    if model.latents is not None:
        return model.latents
    if model.scale is None:
        raise RepaError(
            f"the latents of {model.origin} are normalised by mean and standard deviation of each channel, "
            "and nothing says those",
            "give --vae a folder whose config.json has latents_mean and latents_std",
            field="--vae",
        )
    return MomentLatents(model.scale)


class Scaled(Protocol):
    """What knows the scale of latents."""

    @property
    def scale(self) -> LatentScale:
        """The map from an autoencoder's latents to those of a backbone."""
        ...


def with_scale(model: TrainedModel, autoencoder: Scaled) -> TrainedModel:
    """Return a model whose file does not say the scale of its latents with that of its autoencoder.

    Args:
        model: any.
        autoencoder: that its latents came from.

    Raises:
        RepaError: the autoencoder does not say the statistics of each channel either.
    """
    if model.scale is not None or model.latents is not None:
        return model
    scale = autoencoder.scale
    known = replace(model, scale=scale if scale.mean else None)
    known_latents(known)
    return known


def conditions(
    conditioner: Conditioner, num: int, *, seed: int, asked: Sequence[int] = (), balanced: bool = True
) -> Tensor:
    """Choose the condition of each sample, on the CPU.

    Args:
        conditioner: of the model.
        num: N, number of samples.
        seed: of the draws.
        asked: classes to take in turn; none takes all.
        balanced: take every class equally often; else, and where conditions are no labels, they are drawn.

    Returns:
        ``[N, …]``; for labels int64 ``[N]``.
    """
    if isinstance(conditioner, LabelConditioner) and asked:
        return torch.tensor(asked, dtype=torch.int64).repeat(-(-num // len(asked)))[:num]
    if isinstance(conditioner, LabelConditioner) and balanced:
        return balanced_labels(num, conditioner.num_classes)
    return conditioner.sampling(num, generator_for(seed, "sample condition")).cpu()


def generate(
    model: TrainedModel,
    condition: Tensor,
    settings: SamplerConfig,
    *,
    seed: int,
    batch_size: int,
    batches: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Sample unscaled latents, in batches.

    The noise of sample i depends on seed and i alone, so the batch size changes no sample beyond the rounding
    of the matrix products.

    Args:
        model: what to sample.
        condition: of each sample ``[N, …]``; for labels int64 ``[N]``.
        settings: solver, steps and guidance.
        seed: of the noise.
        batch_size: samples of a batch.
        batches: first sample of each batch to make; all by default.
        progress: called with the number of solver steps of the batch that are done.

    Yields:
        float32 ``[B, C, h, w]`` on the model's device.

    Raises:
        RepaError: the scale of the latents is not known, or a latent has a number that is not finite, which
            an image would show as black.
    """
    made = known_latents(model)
    device = next(model.backbone.parameters()).device
    for first in range(0, len(condition), batch_size) if batches is None else batches:
        part = condition[first : first + batch_size]
        noises = state_noises(seed, range(first, first + len(part)), state_of(model.backbone.config))
        latents = sample(
            model.backbone,
            model.objective,
            next(noises).to(device),
            part.to(device),
            settings,
            noises=noises,
            progress=progress,
        )
        unscaled = made.unscaled(latents.float())
        finite = torch.isfinite(unscaled).flatten(1).all(dim=1).tolist()
        if not all(finite):
            raise RepaError(
                f"sample {first + finite.index(False)} of {model.origin} has numbers that are not finite",
                "take an earlier checkpoint with --ckpt, weaker --guidance or more --steps",
                field="--guidance" if settings.guidance != 1 else "--ckpt",
            )
        yield unscaled


def _trained_without(said: Mapping[str, Any], conditioner: Conditioner) -> bool:
    """Return whether training left out the condition at times."""
    if isinstance(conditioner, LabelConditioner):
        return bool(said.get("settings", {}).get("label_dropout") != 0)
    return conditioner.drop_probability > 0


def _tokens_of(
    said: Mapping[str, Any], weights: Mapping[str, Tensor], shape: tuple[int, int, int]
) -> tuple[TokenLatents | None, TokenSource | None]:
    """Return the tokens that a run learned to make, and whose they are, None of a run on latents.

    Raises:
        RepaError: their statistics are missing, or of another shape than the network's latent.
    """
    if said.get(TOKENS) is None:
        return None, None
    found = from_mapping(TokenSource, said[TOKENS], prefix=f"{TOKENS}.")
    mean, std = (weights.get(f"{NAME}.{each}") for each in ("mean", "std"))
    if mean is None or std is None or any(tuple(each.shape) != shape for each in (mean, std)):
        raise RepaError("the statistics of its tokens are missing, or do not fit", field="--ckpt")
    return TokenLatents(found.columns, mean.float(), std.float()), found


def _model_of(checkpoint: Mapping[str, Any], file: Path, weights: str) -> TrainedModel:
    said = checkpoint[CHECKPOINT_KEY]
    where, remedy = f"checkpoint {file}", "it cannot be sampled, name another with --ckpt"
    prefix = "ema." if weights == "ema" else "backbone."
    state = {
        key.removeprefix(prefix): value.float() if value.is_floating_point() else value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(prefix)
    }
    if wrong := [name for name, value in state.items() if value.dtype != torch.float32]:
        raise RepaError(f"{where} has {wrong[0]} as {state[wrong[0]].dtype}", remedy, field="--ckpt")
    condition = said.get("condition")
    try:
        said_of = None if condition is None else from_mapping(ConditionColumn, condition)
        conditioner = None if said_of is None else build_conditioner(said_of)
        backbone = backbones.load(backbones.from_plain(said["backbone"]), state, conditioner)
        objective = objectives.from_plain(objective_said(said))
        made, tokens = _tokens_of(said, checkpoint["state_dict"], backbone.config.latent_shape)
    except RepaError as error:
        raise RepaError(f"{where}: {error.what}", error.remedy or remedy, field=error.field) from error
    # of a file that others wrote: a size of 0, a text for a number, a tensor of another shape
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = printable(" ".join(str(error).split()))
        raise RepaError(f"{where} does not fit together ({reason})", remedy, field="--ckpt") from error
    latent, names = said["latent"], tuple(said.get("class_names", ()))
    batch_size = said.get("settings", {}).get("batch_size")
    return TrainedModel(
        backbone=backbone.eval().requires_grad_(False),
        objective=objective,
        scale=None
        if made is not None
        else scale_of(
            latent, where=where, remedy=remedy, channels=backbone.config.latent_shape[0], error=RepaError
        ),
        latents=made,
        tokens=tokens,
        autoencoder=latent["autoencoder"],
        autoencoder_sha256=latent["weights_sha256"],
        autoencoder_random=latent["random_weights"],
        steps=checkpoint["global_step"],
        class_names=names if len(names) == backbone.config.num_classes else (),
        guidable=_trained_without(said, backbone.y_embedder),
        condition_weights_sha256=said.get("condition_weights_sha256"),
        condition_random_weights=bool(said.get("condition_random_weights", False)),
        images_seen=checkpoint["global_step"] * batch_size if isinstance(batch_size, int) else None,
        predicts=said.get("predicts", True),
        origin=file,
    )
