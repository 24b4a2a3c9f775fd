"""What shows how a run gets on, the decoder of its previews and what its evaluations need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...trainer.config import TrainConfig
    from ...trainer.run.evaluations import Evaluator
    from .decoder import AnyDecoder


def decoder_of_run(config: TrainConfig, weights: Sequence[str]) -> AnyDecoder | None:
    """Make the autoencoder that made the cache, or the decoder of the run's tokens, for previews.

    It is None without a cache, which the checks report, where latents were imported by no named one, and of
    tokens that nothing decodes.

    Args:
        config: of the run.
        weights: texts ``NAME=FILE``, of teachers.

    Raises:
        RepaError: a text is not of that form.
    """
    import torch

    from ...data.format.columns import AUTOENCODER, MOMENTS
    from ...data.format.foreign import autoencoder_of
    from ...data.tars.cache import manifest_of
    from .decoder import Decoder

    if config.latents != MOMENTS:
        return _decoder_of_tokens(config, weights)
    try:
        provenance = manifest_of(config.cache).sources.get(AUTOENCODER)
    except RepaError:
        return None
    if provenance is None:
        return None
    name = autoencoder_of(provenance)
    if name is None:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Decoder(name, device, random_weights=provenance.random_weights)


def _decoder_of_tokens(config: TrainConfig, weights: Sequence[str]) -> AnyDecoder | None:
    """Make the decoder of a run's tokens, None where the run names none or the checks will refuse it.

    Raises:
        RepaError: the decoder that the run names for its previews cannot be had, or is of other tokens.
    """
    import torch

    from ...data.tars.cache import manifest_of
    from ...trainer.run.checked import Checked
    from ...trainer.run.latent_checks import check_latents
    from ...trainer.run.launch import is_leader
    from .decoder import DecoderOfTokens
    from .encoders import parse_weights

    files, found = parse_weights(weights), Checked()
    manifest = found.attempt(lambda: manifest_of(config.cache))
    if manifest is not None:
        check_latents(config, manifest, found)
    if not config.decoder or found.tokens is None:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = DecoderOfTokens(config.decoder, found.tokens, device, weights=files.get(found.tokens.teacher))
    if config.preview_every and is_leader():
        try:
            decoder.load()  # now, for what cannot be had is else said thousands of steps later
        except RepaError as error:
            raise RepaError(
                error.what,
                "set decoder to one of these tokens, --weights to the teacher's file, or preview_every=0",
                field="decoder",
            ) from error
    return decoder


def evaluator_of_run(config: TrainConfig, weights: Sequence[str]) -> Evaluator | None:
    """Make what evaluations need, None where the run has none.

    Raises:
        RepaError: the cache has nothing that the metrics could be measured against, or an encoder's weights
            cannot be had.
    """
    if not config.evaluate_every:
        return None
    from ...trainer.evaluation.measuring import asked_for, check_asked
    from ...trainer.run.evaluations import Evaluator
    from .references import network_specs, open_reference

    reference = open_reference(config.cache, None)
    try:
        asked = asked_for([each.strip() for each in config.evaluate_metrics.split(",")], reference)
        m = {each: reference.count(each) for each in reference.encoders}
        check_asked(asked, reference, config.evaluate_num, m)
    except RepaError as error:
        raise RepaError(
            error.what,
            "set evaluate_metrics to metrics of the cache's encoders, as fd/<encoder>",
            field="evaluate_metrics",
        ) from error
    assert reference.resolution is not None, "a cache has one"
    names = {each.network for each in asked}
    # of an online run others are of its teachers
    files = [
        each
        for each in weights
        if (config.targets != "online" and not config.decoder) or each.partition("=")[0] in names
    ]
    specs = network_specs(asked, reference, reference.resolution, None, files)
    for spec in specs.values():
        spec.load("cpu")  # now, for what cannot be had is else said thousands of steps later
    return Evaluator(
        asked=asked,
        reference=reference,
        load=lambda device: {name: spec.load(str(device)) for name, spec in specs.items()},
    )
