"""What is found out before anything is sampled, for the commands that sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import RepaError
from ...data.units import counted
from .sampling_checks import check_conditions, check_guidance

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from ...trainer.sampling.generate import TrainedModel
    from ...trainer.sampling.record import SamplingRecord
    from ...trainer.sampling.settings import SamplerConfig
    from .banks import BankAsked
    from .decoder import AnyDecoder
    from .sampling_checks import SamplingFlags
    from .texts import TextAsked

BALANCED = "balanced"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A sampling that can begin.

    Attributes:
        model: what to sample.
        record: what its images are of.
        condition: of each image ``[N, …]``; for labels int64 ``[N]``.
        decoder: latents to images.
        random_autoencoder: whether the decoder's weights are drawn.
        teacher_weights: file of the teacher of a model of tokens; None takes the hub's.
    """

    model: TrainedModel
    record: SamplingRecord
    condition: NDArray[Any]
    decoder: AnyDecoder
    random_autoencoder: bool
    teacher_weights: Path | None = None

    @property
    def told(self) -> NDArray[Any]:
        """What stands beside each image, its condition or the number of its prompt."""
        prompts = self.record.prompts
        return np.arange(len(self.condition)) % len(prompts) if prompts else self.condition


def prepare_sampling(
    checkpoint: Path,
    flags: SamplingFlags,
    *,
    num: int,
    batch_size: int,
    form: str,
    device: str,
    say: Callable[[str], None],
    asked: Callable[[TrainedModel], tuple[int, ...]] = lambda _: (),
    label_mode: str = BALANCED,
    bank: BankAsked | None = None,
    text: TextAsked | None = None,
    run: Path | None = None,
) -> Prepared:
    """Load a model and its autoencoder, and say what the sampling is.

    Args:
        checkpoint: file of the model.
        flags: how to sample.
        num: N, number of images.
        batch_size: images of a forward pass.
        form: ``png`` or ``npz``.
        device: where model and autoencoder go.
        say: prints a line.
        asked: the classes that a model is to sample, in turn; none takes all.
        label_mode: how they are chosen then, ``balanced`` or ``random``.
        bank: what flags say of vectors, for a model that is conditioned on those; None says nothing.
        text: what flags say of prompts, for a model that is conditioned on text; None says nothing.
        run: folder of the run that the checkpoint is of; None if it is of none.

    Raises:
        RepaError: the model or the autoencoder cannot be had, or has nothing of what is asked for.
    """
    from ...trainer.sampling.generate import with_scale
    from ...trainer.sampling.record import SamplingRecord
    from .banks import BankAsked
    from .texts import TextAsked

    bank, text = bank or BankAsked(), text or TextAsked()
    bank.check()

    settings = _settings(flags)
    model = _predicting_model(checkpoint, flags)
    settings = settings.of(model.objective)
    check_guidance(flags, model, say)
    check_conditions(model, bank, text)
    model.backbone.to(device)
    labels = asked(model)
    condition, told = _conditions(
        model, bank, text, flags, num, labels=labels, balanced=label_mode == BALANCED, run=run, device=device
    )
    # before the sampling, which may take hours: without an autoencoder it would be for nothing
    decoder = decoder_of(model, flags.vae, device, say, flags.teacher_weights)
    model = with_scale(model, decoder)
    record = SamplingRecord(
        **_said_of(checkpoint, flags, model, settings),
        **told,
        autoencoder=decoder.name,
        autoencoder_sha256=decoder.weights_sha256,
        num=num,
        labels=labels,
        label_mode=label_mode,
        batch_size=batch_size,
        form=form,
    )
    return Prepared(
        model=model,
        record=record,
        condition=condition,
        decoder=decoder,
        random_autoencoder=flags.vae is None and model.autoencoder_random,
        teacher_weights=flags.teacher_weights,
    )


def _predicting_model(checkpoint: Path, flags: SamplingFlags) -> TrainedModel:
    """Load a model that samples can be made from.

    Raises:
        RepaError: it cannot be had, or is of a warm-up.
    """
    from ...trainer.sampling.generate import model_of_file

    model = model_of_file(checkpoint, weights=flags.weights, family=flags.family)
    if not model.predicts:
        raise RepaError(
            f"{model.origin} is of a warm-up, which does not train what samples are made from",
            "train on, or name a later checkpoint with --ckpt",
            field="--ckpt",
        )
    return model


def _settings(flags: SamplingFlags) -> SamplerConfig:
    from ...trainer.sampling.settings import SamplerConfig

    return SamplerConfig(
        solver=flags.solver,
        steps=flags.steps,
        shift=flags.shift,
        guidance=flags.guidance,
        guidance_cls=flags.guidance_cls,
        guidance_channels=flags.guidance_channels,
        interval=flags.interval,
    )


def _said_of(
    checkpoint: Path, flags: SamplingFlags, model: TrainedModel, settings: SamplerConfig
) -> dict[str, Any]:
    """Return what a record says of the model and its solver."""
    from ...trainer.sampling.record import sha256_of

    guidance_cls = flags.guidance if flags.guidance_cls is None else flags.guidance_cls
    return {
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": sha256_of(checkpoint),
        "step": model.steps,
        "weights": flags.weights,
        "family": flags.family,
        "solver": settings.solver,
        "steps": settings.steps,
        "shift": settings.shift,
        "guidance": settings.guidance,
        "guidance_cls": guidance_cls if model.backbone.config.token_widths else None,
        "guidance_channels": settings.guidance_channels,
        "interval": settings.interval,
        "seed": flags.seed,
    }


def _conditions(
    model: TrainedModel,
    bank: BankAsked,
    text: TextAsked,
    flags: SamplingFlags,
    num: int,
    *,
    labels: tuple[int, ...],
    balanced: bool,
    run: Path | None,
    device: str,
) -> tuple[NDArray[Any], dict[str, Any]]:
    """Choose the condition of each sample ``[N, …]``, and what its record says of them."""
    from ...trainer.models.conditioning import ClassTokenConditioner
    from ...trainer.models.text_conditioning import TextConditioner
    from ...trainer.sampling.generate import conditions
    from .banks import choose_vectors
    from .texts import captions_of_images, encoded_prompts

    conditioner = model.backbone.y_embedder
    if isinstance(conditioner, ClassTokenConditioner):
        vectors = choose_vectors(model, bank, num, seed=flags.seed, run=run)
        told: dict[str, Any] = {
            "bank": vectors.bank,
            "vectors": vectors.vectors,
            "condition_sha256": vectors.sha256,
        }
        return vectors.condition.numpy(), told
    if isinstance(conditioner, TextConditioner):
        texts = (
            encoded_prompts(model, text, num, device=device)
            if text.given()
            else captions_of_images(model, bank.bank, num, seed=flags.seed, run=run)
        )
        told = {"bank": texts.bank, "prompts": texts.prompts, "condition_sha256": texts.sha256}
        return texts.condition.numpy(), told
    found = conditions(conditioner, num, seed=flags.seed, asked=labels, balanced=balanced)
    return found.numpy(), {}


def decoder_of(
    model: TrainedModel,
    vae: str | None,
    device: str,
    say: Callable[[str], None],
    teacher_weights: Path | None = None,
) -> AnyDecoder:
    """Load what makes images of a model's samples.

    Raises:
        RepaError: it cannot be had, or has latents of other channels.
    """
    from ...pipeline.encoders.vae import DEFAULT_VAE, STABLE_DIFFUSION
    from .decoder import Decoder

    if model.tokens is not None:
        return _decoder_of_tokens(model, vae, device, teacher_weights)
    if teacher_weights is not None:
        raise RepaError(
            f"--teacher-weights is of a model of tokens, and {model.origin} makes latents",
            "leave it out",
            field="--teacher-weights",
        )
    name = vae or model.autoencoder or DEFAULT_VAE
    channels = model.latent_shape[0]
    if vae is None and model.autoencoder is None:
        if channels != STABLE_DIFFUSION["latent_channels"]:
            raise RepaError(
                f"{model.origin} does not say whose latents of {counted(channels, 'channel')} it learned",
                "give --vae the autoencoder that the latents came from",
                field="--vae",
            )
        say(f"note: {model.origin} does not say whose latents it learned: {name} decodes them")
    decoder = Decoder(name, device, random_weights=vae is None and model.autoencoder_random)
    autoencoder = decoder.load()
    if autoencoder.latent_channels != channels:
        raise RepaError(
            f"{name} decodes latents of {counted(autoencoder.latent_channels, 'channel')}, and those of "
            f"{model.origin} have {channels}",
            "give --vae the autoencoder that the latents came from",
            field="--vae",
        )
    if model.autoencoder_sha256 is not None and decoder.weights_sha256 != model.autoencoder_sha256:
        say(f"note: {name} has other weights than the autoencoder that {model.origin} was trained with")
    return decoder


def _decoder_of_tokens(
    model: TrainedModel, name: str | None, device: str, teacher_weights: Path | None
) -> AnyDecoder:
    """Load the decoder of the tokens that a model makes.

    Raises:
        RepaError: nothing says which, or it cannot be had or is of other tokens.
    """
    from .decoder import DecoderOfTokens

    assert model.tokens is not None, "of a model of tokens"
    chosen = name or model.autoencoder
    if not chosen:
        raise RepaError(
            f"{model.origin} makes tokens of {model.tokens.teacher}, and nothing says what decodes them",
            "give --vae a folder or hub name of an AutoencoderRAE of diffusers for this teacher",
            field="--vae",
        )
    decoder = DecoderOfTokens(chosen, model.tokens, device, weights=teacher_weights)
    decoder.load()
    return decoder
