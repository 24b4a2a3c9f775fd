"""The checks before step 0, which find all problems at once, each with what mends it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ...data.errors import RepaError
from ...data.format.columns import source_of
from ...data.format.foreign import foreign_lines
from ...data.machine import reading_threads
from ...data.reading.order import split_holdout
from ...data.reading.reader import CacheReader
from ...data.tars.cache import TarCache, manifest_of
from ...data.tars.names import names_tars
from ...data.tars.order import steps_of_epoch
from ...data.units import counted
from ..added_callbacks import find_callback
from ..compiling import missing
from ..input.datamodule import columns_of_phase
from ..input.online import live_columns, offer, read_columns
from ..input.tar_stream import GUARANTEES
from ..methods.outside import find_method
from ..models import registry as backbones
from ..objectives.registry import make_objective, name_of
from ..sampling.settings import SamplerConfig
from ..step.randomness import derived_seed
from .agreement import (
    check_condition,
    check_denoised,
    check_prediction,
    check_recomputed,
    check_times,
    check_token_times,
)
from .checked import RANDOM_WEIGHTS, Checked
from .first_steps import check_first_steps
from .gradient_angle import angle_problems
from .latent_checks import check_latents, check_targets, check_width
from .lightning_trainer import make_trainer
from .loggers import logger_problems
from .open_files import check_open_files
from .sharded_strategy import sharding_problems

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...data.format.manifest import Manifest
    from ..config import TrainConfig
    from ..input.online import LiveTargets
    from ..methods.base import Method
    from ..models.base import BackboneConfig
    from ..models.capture import BackboneFacts


def check(config: TrainConfig, live: LiveTargets | None = None) -> Checked:
    """Look at configuration, cache, devices and method together, without reading a row or building a network.

    Args:
        config: of the run.
        live: computes the targets if the configuration says ``targets=online``; else it is not looked at.
    """
    found = Checked(live=live if config.targets == "online" else None)
    for problem in logger_problems(config):
        found.add(problem.what, problem.remedy, field=problem.field)
    for name in config.trainer.get("callbacks", ()):
        found.attempt(partial(find_callback, name))
    _check_model_name(config, found)
    _check_sampling(config, found)
    _check_devices(config, found)
    if not config.cache:
        found.add("no cache was named", "name one with --cache", field="--cache")
        return found
    found.manifest = found.attempt(lambda: manifest_of(config.cache))
    if found.manifest is None:
        return found
    if config.targets == "online":
        _check_live(config, found.manifest, found)
    _check_backbone(config, found.manifest, found)
    if found.backbone is not None:
        check_prediction(config, found.backbone, found)
        check_recomputed(config, found.backbone, found)
        check_width(config, found.backbone, found)
        _check_method(config, found.manifest, found.backbone, found)
    if found.backbone is not None and found.method is not None:
        check_condition(config, found.manifest, found.backbone, found.method, found)
    if found.method is not None:
        check_targets(config, found.method, found)
        check_first_steps(config, found.method, found)
        _check_columns(config, found.manifest, found.method, found)
    if isinstance(found.reader, TarCache):
        _check_tars(config, found.reader, found)
    elif found.reader is not None:
        _check_rows(config, found.reader, found)
    check_open_files(found)
    return found


def make_method(
    config: TrainConfig, facts: BackboneFacts, manifest: Manifest, live: LiveTargets | None = None
) -> Method:
    """Build the method, its parameters drawn from the run's seed wherever its targets come from.

    Args:
        config: of the run.
        facts: of the backbone.
        manifest: of the cache.
        live: computes the targets; None reads them.
    """
    build: Callable[..., Method] = find_method(config.method_name)
    there = offer(manifest, live)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "method"))
        seen = replace(facts, resolution=manifest.resolution)
        return build(config.method, seen, there.columns, there.grids, there.notes)


def attention_blocks(config: TrainConfig) -> tuple[int, ...]:
    """Return the blocks of a live teacher whose attention the method compares, none if that cannot be told.

    Raises:
        RepaError: there is no cache.
    """
    manifest = manifest_of(config.cache)
    found = Checked()
    _check_backbone(config, manifest, found)
    if found.backbone is None:
        return ()
    return make_method(config, found.backbone.facts, manifest).attention_blocks()


def _check_model_name(config: TrainConfig, found: Checked) -> None:
    found.attempt(lambda: backbones.family_of(config.model))


def _check_sampling(config: TrainConfig, found: Checked) -> None:
    """Check whether previews and evaluations can be sampled as they are to be."""
    objective = make_objective(config.objective)
    for name, every, solver in (
        ("preview", config.preview_every, objective.preview_solver),
        ("evaluate", config.evaluate_every, config.evaluate_solver),
    ):
        if not every:
            continue
        try:
            steps, shift = (getattr(config, f"{name}_{each}") for each in ("steps", "shift"))
            SamplerConfig(solver=solver, steps=steps, shift=shift).of(objective)
        except RepaError as error:
            field = f"{name}_{error.field.removeprefix('--')}"
            found.add(error.what, f"{error.remedy}, with `--set {field}=…`", field=field)


def _check_devices(config: TrainConfig, found: Checked) -> None:
    trainer = found.attempt(lambda: make_trainer(config))
    if trainer is None:
        return
    found.world_size = trainer.world_size
    found.device = trainer.strategy.root_device
    if config.compile in ("blocks", "whole") and (lacks := missing(found.device.type)):
        found.add(
            f"compile={config.compile} needs {lacks}, and there is none",
            "install it, or --set compile=off",
            field="compile",
        )
    found.threads = reading_threads(config.threads, trainer.num_devices)
    ranks, accumulate = trainer.world_size, config.accumulate
    if config.batch_size % (ranks * accumulate):
        found.add(
            f"a batch of {counted(config.batch_size, 'image')} does not divide into "
            f"{counted(ranks, 'device')} × {counted(accumulate, 'micro-batch')}",
            f"set --batch-size to a multiple of {ranks * accumulate}",
            field="--batch-size",
        )


def _check_live(config: TrainConfig, manifest: Manifest, found: Checked) -> None:
    if found.live is None:
        found.add(
            "targets is online and there is no live teacher",
            "pass one as `live`, see trainer.input.online",
            field="--targets",
        )


def _check_backbone(config: TrainConfig, manifest: Manifest, found: Checked) -> None:
    classes = len(manifest.class_names)
    if not classes:
        found.add(
            f"cache {config.cache} has no classes", "write it again with `repa preprocess`", field="--cache"
        )
    shape = check_latents(config, manifest, found)
    if shape is None:
        return
    if found.attempt(lambda: backbones.family_of(config.model)) is None:
        return
    found.backbone = found.attempt(
        lambda: backbones.config_of(
            config.model,
            input_size=shape.side,
            in_channels=shape.channels,
            num_classes=max(classes, 1),
            **{name: getattr(config, name) for name in backbones.SETTINGS},
        )
    )


def _check_method(config: TrainConfig, manifest: Manifest, backbone: BackboneConfig, found: Checked) -> None:
    found.method = found.attempt(lambda: make_method(config, backbone.facts, manifest, found.live))
    if found.method is None:
        return
    for problem in (
        *found.method.problems(),
        *angle_problems(config, found.method, backbone.facts),
        *sharding_problems(config, found.method),
    ):
        found.add(problem.what, problem.remedy, field=problem.field)
    check_times(config, found.method, found)
    check_token_times(config, backbone, found.method, found)
    if found.method.needs_target and not make_objective(config.objective).has_target:
        found.add(
            f"method {config.method_name} compares the prediction with its target, and objective "
            f"{name_of(config.objective)} has none",
            "take a --model of another objective, or another --method",
            field="objective",
        )
    check_denoised(config, backbone, found.method, found)


def _check_columns(config: TrainConfig, manifest: Manifest, method: Method, found: Checked) -> None:
    needed = dict.fromkeys(
        column
        for phase in method.phases()
        for column in columns_of_phase(method, phase, found.condition_columns, found.latent_columns)
    )
    if found.live is not None and not live_columns(needed, found.live) and not found.problems:
        found.add(
            f"method {config.method_name} takes nothing from a teacher",
            "leave --targets online out",
            field="--targets",
        )
    read = read_columns(needed, found.live)
    missing = [column for column in read if column not in manifest.columns]
    if missing and not found.problems:
        found.attempt(lambda: manifest.require(tuple(missing), where=config.cache))
    present = tuple(column for column in read if column in manifest.columns)
    for source in dict.fromkeys(source_of(column) for column in present):
        if manifest.sources[source].random_weights:
            found.warnings.append(
                f"{source} in cache {config.cache} was computed with random weights: {RANDOM_WEIGHTS}"
            )
    found.warnings += foreign_lines(manifest)
    if names_tars(config.cache):
        found.reader = found.attempt(lambda: TarCache(config.cache, present))
        return
    if manifest.outdated:
        found.warnings.append(f"cache {config.cache} {manifest.outdated}")
    found.reader = found.attempt(
        lambda: CacheReader(config.cache, present, check_crc=config.check_crc, direct=config.direct)
    )


def _check_rows(config: TrainConfig, reader: CacheReader, found: Checked) -> None:
    classes = len(reader.manifest.class_names)
    if len(reader.labels) and not 0 <= int(reader.labels.min()) <= int(reader.labels.max()) < max(classes, 1):
        found.add(
            f"labels of cache {config.cache} run from {reader.labels.min()} to {reader.labels.max()}, but it "
            f"names {counted(classes, 'class')}",
            "write the cache again with `repa preprocess`",
            field="--cache",
        )
    split = found.attempt(lambda: split_holdout(reader.valid_rows, config.holdout))
    if split is None:
        return
    found.train_rows, found.held_out_rows = split
    if config.batch_size > len(found.train_rows):
        found.add(
            f"a batch of {counted(config.batch_size, 'image')} is larger than the "
            f"{counted(len(found.train_rows), 'image')} to train on",
            f"set --batch-size to at most {len(found.train_rows)}, or cache more images",
            field="--batch-size",
        )


def _check_tars(config: TrainConfig, cache: TarCache, found: Checked) -> None:
    import_them = "make a cache of them with `repa cache import`"
    if found.live is not None:
        found.add(
            f"live teachers cannot be called beside tars, as {config.cache}", import_them, field="--targets"
        )
    if found.method is not None and any(each.standardised for each in found.method.denoised()):
        found.add(
            f"method {config.method_name} standardises a column by statistics of rows, and tars are read in "
            "sequence",
            f"leave method.standardise out, or {import_them}",
            field="method.standardise",
        )
    if found.tokens is not None:
        found.add(
            f"latents={config.latents} are standardised by statistics of rows, and tars are read in sequence",
            import_them,
            field="latents",
        )
    if config.holdout:
        found.add(
            f"holdout={config.holdout}: rows cannot be held out of tars, which are read in sequence",
            f"leave holdout at 0, or {import_them}",
            field="holdout",
        )
    if config.order != "full":
        found.add(
            f"order={config.order} is of caches, tars have one order", "leave order at full", field="order"
        )
    images = len(cache.valid_rows)
    found.train_rows, found.held_out_rows = cache.valid_rows, cache.valid_rows[:0]
    if found.world_size is None:
        return
    world = found.world_size
    steps = found.attempt(lambda: steps_of_epoch(cache.counts, config.batch_size, world))
    if steps is not None:
        left_out = images - steps * config.batch_size
        found.warnings.append(
            GUARANTEES.format(buffer=config.shuffle_buffer, images=images, left_out=left_out)
        )
