"""The checks before step 0, which find all problems at once, each with what mends it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError
from ...data.format.columns import (
    MOMENTS,
    SCALE_SUFFIX,
    TEXT_STATES,
    column_name,
    source_of,
    split_column,
)
from ...data.launchers import launched_world
from ...data.reading.latents import chosen_scale
from ...data.reading.order import split_holdout
from ...data.reading.reader import CacheReader
from ...data.tars.cache import manifest_of
from ...data.tars.names import names_tars
from ..models.denoiser_facts import SD3, DenoiserFacts, read_denoiser
from ..run.checked import RANDOM_WEIGHTS, Checked
from ..run.lightning_trainer import make_trainer
from .tokens import MOST_NUMBERS, numbers_of

if TYPE_CHECKING:
    from ...data.format.manifest import Manifest
    from .settings import SoftConfig


@dataclass(frozen=True, kw_only=True)
class TextColumns:
    """The columns of a caption that the denoiser reads.

    Attributes:
        states: of the text states.
        scale: of their scales where they are int8; empty where they are not.
        pooled: of the pooled text; empty where the denoiser takes none.
        length: S, states of a caption.
        embedded: whether the states have passed the context embedder of Stable Diffusion 3 already.
    """

    states: str
    scale: str
    pooled: str
    length: int
    embedded: bool

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(name for name in (self.states, self.scale, self.pooled) if name)


@dataclass(kw_only=True)
class SoftChecked(Checked):
    """What the checks found, None where a problem kept it from being found.

    Attributes:
        config: the settings, those of the kind of denoiser filled in.
        facts: of the denoiser.
        text: columns of the captions.
        shape: of the tokens, ``[n, D]`` or ``[L, n, D]``.
    """

    config: SoftConfig | None = None
    facts: DenoiserFacts | None = None
    text: TextColumns | None = None
    shape: tuple[int, ...] | None = None


def check(config: SoftConfig) -> SoftChecked:
    """Look at settings, denoiser, cache and device together, without reading a row or a weight.

    Args:
        config: of the run.
    """
    found = SoftChecked()
    world = launched_world()
    if world is not None and world.size > 1:
        found.add(
            f"{world.launcher} started {world.size} processes, and SoftREPA trains in one: the captions of a "
            "batch are its negatives",
            "start it alone; more images of a step are --batch-size, and --set rows keeps the memory low",
            field="--batch-size",
        )
    else:
        trainer = found.attempt(lambda: make_trainer(config.as_run()))
        if trainer is not None:
            found.world_size, found.device = trainer.world_size, trainer.strategy.root_device
    if config.model:
        found.facts = found.attempt(lambda: read_denoiser(config.model))
    else:
        found.add("no model was named", "name a folder or a name on the hub with --model", field="--model")
    if found.facts is not None:
        _check_settings(config, found.facts, found)
    if not config.cache:
        found.add("no cache was named", "name one with --cache", field="--cache")
    elif names_tars(config.cache):
        found.add(
            f"SoftREPA trains from a cache, not from tars, as {config.cache}",
            "make a cache of them with `repa cache import`",
            field="--cache",
        )
    else:
        found.manifest = found.attempt(lambda: manifest_of(config.cache))
    if found.manifest is not None and found.facts is not None:
        _check_latents(config, found.manifest, found.facts, found)
        found.text = found.attempt(lambda: text_columns(config, found.manifest, found.facts))
    if found.text is not None:
        _check_rows(config, found.text, found)
    return found


def _check_settings(config: SoftConfig, facts: DenoiserFacts, found: SoftChecked) -> None:
    """Fill in what the kind of denoiser says, and refuse what it has no use for."""
    foreign = {"layers": config.layers} if facts.is_unet else {"blocks": config.blocks}
    for name, value in foreign.items():
        if value is not None:
            found.add(
                f"{name} is of {'Stable Diffusion 3' if facts.is_unet else 'U-Nets'}, and {facts.name} is "
                f"{facts.kind}",
                f"leave {name} out",
                field=name,
            )
            return
    filled = config.filled(facts.kind)
    if facts.is_unet and not filled.blocks:
        found.add("no part of the U-Net would see the tokens", "set blocks=down", field="blocks")
    if not facts.is_unet and (filled.layers or 0) > facts.blocks:
        found.add(
            f"layers is {filled.layers}, and {facts.name} has {facts.blocks} blocks",
            f"set layers to at most {facts.blocks}",
            field="layers",
        )
    for name in ("interpolate", "time_start"):
        if not filled.time_table and getattr(config, name) != getattr(type(config)(), name):
            found.add(f"{name} is of the time table, and there is none", f"leave {name} out", field=name)
    assert filled.tokens is not None, "every preset says it"
    shape: tuple[int, ...] = (filled.tokens, facts.token_width)
    if not facts.is_unet:
        assert filled.layers is not None, "its preset says it"
        shape = (filled.layers, *shape)
        if filled.start != "normal":
            found.add(
                f"start={filled.start} begins with a text state, and tokens of Stable Diffusion 3 are none",
                "set start=normal",
                field="start",
            )
    numbers = numbers_of(shape, time_table=bool(filled.time_table))
    if numbers >= MOST_NUMBERS:
        found.add(
            f"{numbers:,} numbers would be trained, and SoftREPA trains fewer than {MOST_NUMBERS:,}",
            "set fewer tokens or layers",
            field="tokens",
        )
    found.config, found.shape = filled, shape


def _check_latents(config: SoftConfig, manifest: Manifest, facts: DenoiserFacts, found: SoftChecked) -> None:
    if found.attempt(lambda: manifest.require((MOMENTS,), where=config.cache)) is None and (
        MOMENTS not in manifest.columns
    ):
        return
    found.scale = found.attempt(lambda: chosen_scale(manifest, "autoencoder", where=config.cache))
    channels = manifest.columns[MOMENTS].shape[0] // 2
    if channels != facts.channels:
        found.add(
            f"latents of {config.cache} have {channels} channels, and {facts.name} denoises {facts.channels}",
            "cache them with the autoencoder of the model, `repa preprocess --vae`",
            field="--cache",
        )
    if len(manifest.views) > 1:
        found.add(
            f"{config.cache} has {len(manifest.views)} views of an image, and captions say left and right",
            "write a cache of one view",
            field="--cache",
        )


def text_columns(config: SoftConfig, manifest: Manifest | None, facts: DenoiserFacts | None) -> TextColumns:
    """Return the columns of the captions that a denoiser reads.

    Args:
        config: names one, or none where only one fits.
        manifest: of images and captions.
        facts: of the denoiser.

    Raises:
        RepaError: there is none, there are several, or the one named does not fit.
    """
    assert manifest is not None, "the caller has looked"
    assert facts is not None, "the caller has looked"
    widths = {facts.text_width} | ({facts.token_width} if facts.kind == SD3 else set())
    there = [name for name in manifest.columns if split_column(name)[1] == TEXT_STATES]
    fitting = [name for name in there if _fits(name, manifest, facts, widths)]
    if config.condition:
        try:
            manifest.require((config.condition,), where=config.cache)
        except RepaError as error:
            raise RepaError(error.what, error.remedy, field="condition") from error
        if config.condition not in fitting:
            raise RepaError(
                f"{config.condition} does not fit {facts.name}, which reads states of width "
                f"{' or '.join(map(str, sorted(widths)))}{_and_pooled(facts)}",
                f"take one of {', '.join(fitting)}" if fitting else "add one with `repa preprocess`",
                field="condition",
            )
        states = config.condition
    elif len(fitting) == 1:
        states = fitting[0]
    elif fitting:
        raise RepaError(
            f"several columns fit {facts.name}: {', '.join(fitting)}",
            f"name one, as --set condition={fitting[0]}",
            field="condition",
        )
    else:
        raise RepaError(
            f"no captions of {config.cache} have states of width "
            f"{' or '.join(map(str, sorted(widths)))}{_and_pooled(facts)}, which {facts.name} reads",
            "add them with `repa preprocess --captions FILE --text-encoder NAME`",
            field="condition",
        )
    spec = manifest.columns[states]
    return TextColumns(
        states=states,
        scale=f"{states}{SCALE_SUFFIX}" if spec.dtype == "int8" else "",
        pooled=_pooled_of(states) if facts.pooled_width else "",
        length=spec.shape[0],
        embedded=spec.shape[1] != facts.text_width,
    )


def _fits(states: str, manifest: Manifest, facts: DenoiserFacts, widths: set[int]) -> bool:
    if manifest.columns[states].shape[1] not in widths:
        return False
    pooled = manifest.columns.get(_pooled_of(states))
    return not facts.pooled_width or (pooled is not None and pooled.shape == (facts.pooled_width,))


def _pooled_of(states: str) -> str:
    return column_name(split_column(states)[0], "pooled")


def _and_pooled(facts: DenoiserFacts) -> str:
    return f" and pooled text of width {facts.pooled_width}" if facts.pooled_width else ""


def _check_rows(config: SoftConfig, text: TextColumns, found: SoftChecked) -> None:
    """Open the cache, and split its rows."""
    columns = (MOMENTS, *text.names)
    assert found.manifest is not None, "the text was found in it"
    for source in dict.fromkeys(map(source_of, columns)):
        if source in found.manifest.sources and found.manifest.sources[source].random_weights:
            found.warnings.append(
                f"{source} in cache {config.cache} was computed with random weights: {RANDOM_WEIGHTS}"
            )
    reader = found.attempt(
        lambda: CacheReader(config.cache, columns, check_crc=config.check_crc, direct=config.direct)
    )
    if reader is None:
        return
    found.reader = reader
    split = found.attempt(lambda: split_holdout(reader.valid_rows, config.holdout))
    if split is None:
        return
    found.train_rows, found.held_out_rows = split
    if 0 < config.holdout < config.batch_size:
        found.add(
            f"{config.holdout} held-out rows make no batch of {config.batch_size}, within which they are "
            "compared",
            f"set holdout to at least {config.batch_size}, or to 0",
            field="holdout",
        )
    if config.batch_size > len(found.train_rows):
        found.add(
            f"a batch of {config.batch_size} is larger than the {len(found.train_rows)} images to train on",
            "set a smaller --batch-size or holdout",
            field="--batch-size",
        )


def identity_of(checked: SoftChecked, weights_sha256: str) -> dict[str, Any]:
    """Return what a checkpoint shares with the run that resumes it, in plain values.

    Args:
        checked: a run that passed the checks.
        weights_sha256: of the denoiser.
    """
    reader, scale = checked.reader, checked.scale
    assert isinstance(reader, CacheReader), "the checks have passed"
    assert scale is not None, "the checks have passed"
    manifest = reader.manifest
    used = dict.fromkeys(map(source_of, reader.columns))
    sources = {name: json.dumps(manifest.sources[name].identity(), sort_keys=True).encode() for name in used}
    captions = None if reader.texts is None else reader.texts.manifest.identity
    return {
        "model": {"weights": weights_sha256},
        "latent": scale.notes(),
        "cache": {
            "source": manifest.source_fingerprint,
            "keys": manifest.keys_sha256,
            "valid rows": hashlib.sha256(reader.valid_rows.astype("<i8").tobytes()).hexdigest(),
            "captions": captions,
            **{name: hashlib.sha256(raw).hexdigest() for name, raw in sources.items()},
        },
    }
