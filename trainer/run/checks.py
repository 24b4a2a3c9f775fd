"""One look at everything before step 0: all problems at once, each with what mends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ...data.errors import RepaError
from ...data.format.columns import KINDS, LABEL, MOMENTS, source_of
from ...data.format.manifest import ORIGINAL_VIEW
from ...data.reading.latents import LatentScale, latent_scale
from ...data.reading.order import split_holdout
from ...data.reading.reader import CacheReader
from ...data.tars.cache import TarCache, manifest_of
from ...data.tars.names import names_tars
from ...data.tars.order import steps_of_epoch
from ...data.units import counted
from ..input.datamodule import columns_of_phase
from ..input.online import live_columns, offer, read_columns
from ..input.tar_stream import GUARANTEES
from ..methods.base import Method, Problem
from ..methods.outside import find_method
from ..models import registry as backbones
from ..step.randomness import derived_seed
from .gradient_angle import angle_problems
from .lightning_trainer import make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from ...data.format.manifest import Manifest, Provenance
    from ..config import TrainConfig
    from ..input.online import LiveTargets
    from ..models.base import BackboneConfig
    from ..models.capture import BackboneFacts

T = TypeVar("T")

RANDOM_WEIGHTS = "good for trying things out, not for results"


class ProblemsError(RepaError):
    """A run cannot start; the message lists every problem and its remedy.

    Attributes:
        problems: all of them.
    """

    def __init__(self, problems: list[Problem]) -> None:
        count = counted(len(problems), "problem")
        lines = [
            f"\n  {number}. {each.what}\n     → {each.remedy}"
            for number, each in enumerate(problems, start=1)
        ]
        super().__init__(f"the run cannot start: {count}{''.join(lines)}")
        self.problems = problems


@dataclass(kw_only=True)
class Checked:
    """What the checks found; what could not be found for a problem is None.

    Attributes:
        problems: everything that keeps the run from starting.
        warnings: lines that the user should read, but that stop nothing.
        manifest: of the cache.
        backbone: architecture.
        method: the method, freshly initialised from the seed.
        scale: of the latents.
        reader: of every column that some phase reads.
        live: computes the targets of an online run.
        live_sources: what its columns come from, once it is loaded.
        train_rows: rows to train on.
        held_out_rows: rows that are not.
        world_size: processes of the run.
        device: training device of this process.
    """

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    manifest: Manifest | None = None
    backbone: BackboneConfig | None = None
    method: Method | None = None
    scale: LatentScale | None = None
    reader: CacheReader | TarCache | None = None
    live: LiveTargets | None = None
    live_sources: Mapping[str, Provenance] = field(default_factory=dict)
    train_rows: NDArray[np.int64] | None = None
    held_out_rows: NDArray[np.int64] | None = None
    world_size: int | None = None
    device: torch.device | None = None

    def add(self, what: str, remedy: str, *, field: str = "") -> None:
        """Add a problem, once."""
        problem = Problem(what=what, remedy=remedy, field=field)
        if problem not in self.problems:
            self.problems.append(problem)

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Return what an action returns; its mistake is a problem."""
        try:
            return action()
        except RepaError as error:
            self.add(error.what, error.remedy, field=error.field)
            return None


def check(config: TrainConfig, live: LiveTargets | None = None) -> Checked:
    """Look at configuration, cache, devices and method together; reads no row, loads and builds no network.

    Args:
        config: of the run.
        live: computes the targets if the configuration says ``targets=online``; else it is not looked at.
    """
    found = Checked(live=live if config.targets == "online" else None)
    _check_model_name(config, found)
    _check_devices(config, found)
    if not config.cache:
        found.add("no cache was named", "name one with --cache")
        return found
    found.manifest = found.attempt(lambda: manifest_of(config.cache))
    if found.manifest is None:
        return found
    if config.targets == "online":
        _check_live(config, found.manifest, found)
    _check_backbone(config, found.manifest, found)
    if found.backbone is not None:
        _check_method(config, found.manifest, found.backbone, found)
    if found.method is not None:
        _check_columns(config, found.manifest, found.method, found)
    if isinstance(found.reader, TarCache):
        _check_tars(config, found.reader, found)
    elif found.reader is not None:
        _check_rows(config, found.reader, found)
    return found


def condition_column(method: Method, num_classes: int) -> str:
    """Column that the method's conditioner embeds; the label without one."""
    with torch.random.fork_rng(devices=[]):
        conditioner = method.make_conditioner(num_classes)
    return LABEL if conditioner is None else conditioner.column


def make_method(
    config: TrainConfig, facts: BackboneFacts, manifest: Manifest, live: LiveTargets | None = None
) -> Method:
    """The method, its parameters drawn from the run's seed: they do not depend on where targets come from.

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
        return build(config.method, facts, there.columns, there.grids, there.notes)


def attention_blocks(config: TrainConfig) -> tuple[int, ...]:
    """Blocks of a live teacher whose attention the method compares; none if that cannot be told.

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


def _check_devices(config: TrainConfig, found: Checked) -> None:
    trainer = found.attempt(lambda: make_trainer(config))
    if trainer is None:
        return
    found.world_size = trainer.world_size
    found.device = trainer.strategy.root_device
    ranks, accumulate = trainer.world_size, config.accumulate
    if config.batch_size % (ranks * accumulate):
        found.add(
            f"a batch of {counted(config.batch_size, 'image')} does not divide into "
            f"{counted(ranks, 'device')} × {counted(accumulate, 'micro-batch')}",
            f"set --batch-size to a multiple of {ranks * accumulate}",
        )


def _check_live(config: TrainConfig, manifest: Manifest, found: Checked) -> None:
    if found.live is None:
        found.add("targets is online and there is no live teacher", "pass one as `live`, see trainer.online")
    if manifest.views != (ORIGINAL_VIEW,):
        found.add(
            f"cache {config.cache} has the views {', '.join(manifest.views)}, and live teachers see images "
            "as they are",
            "train with --targets cache, or from a cache of one view",
        )


def _check_backbone(config: TrainConfig, manifest: Manifest, found: Checked) -> None:
    classes = len(manifest.class_names)
    if not classes:
        found.add(f"cache {config.cache} has no classes", "write it again with `repa preprocess`")
    found.attempt(lambda: manifest.require((MOMENTS,), where=config.cache))
    found.scale = found.attempt(lambda: latent_scale(manifest, where=config.cache))
    shape = manifest.columns[MOMENTS].shape if MOMENTS in manifest.columns else ()
    if not KINDS["moments"].fits(shape):
        return
    if shape[1] != shape[2]:
        found.add(
            f"column {MOMENTS} has latents of {shape[1]}×{shape[2]}, and the backbones take square ones",
            "write the cache again with `repa preprocess`",
        )
        return
    if found.attempt(lambda: backbones.family_of(config.model)) is None:
        return
    found.backbone = found.attempt(
        lambda: backbones.config_of(
            config.model,
            input_size=shape[1],
            in_channels=shape[0] // 2,
            num_classes=max(classes, 1),
            qk_norm=config.qk_norm,
        )
    )


def _check_method(config: TrainConfig, manifest: Manifest, backbone: BackboneConfig, found: Checked) -> None:
    found.method = found.attempt(lambda: make_method(config, backbone.facts, manifest, found.live))
    if found.method is not None:
        for problem in (
            *found.method.problems(),
            *angle_problems(config, found.method, backbone.facts),
        ):
            found.add(problem.what, problem.remedy, field=problem.field)


def _check_columns(config: TrainConfig, manifest: Manifest, method: Method, found: Checked) -> None:
    condition = condition_column(method, len(manifest.class_names))
    needed = dict.fromkeys(
        column for phase in method.phases() for column in columns_of_phase(method, phase, condition)
    )
    if found.live is not None and not live_columns(needed, found.live) and not found.problems:
        found.add(f"method {config.method_name} takes nothing from a teacher", "leave --targets online out")
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
    if names_tars(config.cache):
        found.reader = found.attempt(lambda: TarCache(config.cache, present))
        return
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
        )


def _check_tars(config: TrainConfig, cache: TarCache, found: Checked) -> None:
    import_them = "make a cache of them with `repa cache import`"
    if found.live is not None:
        found.add(f"live teachers cannot be called beside tars, as {config.cache}", import_them)
    if config.holdout:
        found.add(
            f"holdout={config.holdout}: rows cannot be held out of tars, which are read in sequence",
            f"leave holdout at 0, or {import_them}",
        )
    if config.order != "full":
        found.add(f"order={config.order} is of caches, tars have one order", "leave order at full")
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


def describe_phases(checked: Checked, config: TrainConfig) -> list[Mapping[str, Any]]:
    """For ``--dry-run``: each phase with its steps, its columns (read, live, missing) and the bytes read."""
    if checked.method is None or checked.manifest is None:
        return []
    condition = condition_column(checked.method, len(checked.manifest.class_names))
    rows: list[Mapping[str, Any]] = []
    for phase in checked.method.phases():
        needed = columns_of_phase(checked.method, phase, condition)
        columns = read_columns(needed, checked.live)
        specs = checked.manifest.columns
        row_bytes = sum(specs[name].row_bytes for name in columns if name in specs)
        stop = config.max_steps if phase.stop is None else min(phase.stop, config.max_steps)
        steps = max(stop - phase.start, 0)
        rows.append(
            {
                "phase": phase.name,
                "first": phase.start,
                "last": phase.start + steps - 1,
                "steps": steps,
                "columns": columns,
                "live": live_columns(needed, checked.live),
                "missing": tuple(name for name in columns if name not in specs),
                "step_bytes": row_bytes * config.batch_size,
                "all_bytes": row_bytes * config.batch_size * steps,
            }
        )
    return rows
