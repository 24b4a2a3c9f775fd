"""Loading the models of a cache, each once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.format.columns import AUTOENCODER, model_of
from .columns.models import AutoencoderModel, EncoderModel, SourceModel
from .plan import present_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .config import PreprocessConfig


def load_models(config: PreprocessConfig, sources: Iterable[str], device: str) -> list[SourceModel]:
    """Load the models of these sources, each once.

    Args:
        config: the command, resolved.
        sources: ``sd-vae``, names of encoders, and their attention.
        device: ``cpu`` or ``cuda:<index>``.

    Raises:
        RepaError: weights that are not there, or not of this model.
    """
    from .encoders import load_encoder
    from .encoders.vae import Autoencoder

    assert config.vae is not None, "the plan resolves the command"
    assert config.batch_size is not None, "the plan resolves the command"
    present = present_manifest(config.cache)
    known = {} if present is None else present.sources
    wanted: dict[str, list[str]] = {}
    for source in sources:
        wanted.setdefault(model_of(source), []).append(source)
    models: list[SourceModel] = []
    for name, own in wanted.items():
        if name == AUTOENCODER:
            autoencoder = Autoencoder.load(config.vae, device, config.compute_dtype, config.random_weights)
            models.append(AutoencoderModel(autoencoder, config.batch_size, config.resolution, known))
            continue
        encoder = load_encoder(
            config.teacher(name),
            resolution=config.resolution,
            device=device,
            compute_dtype=config.compute_dtype,
            weights=config.weights.get(name),
            random_weights=config.random_weights,
        )
        models.append(
            EncoderModel(
                encoder,
                own,
                batch_size=config.batch_size,
                dtype=config.feature_dtype,
                recorded={source: each for source, each in known.items() if model_of(source) == name},
                attention=config.attention_settings(name),
                compressor=config.compress,
            )
        )
    return models
