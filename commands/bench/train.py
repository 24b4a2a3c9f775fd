"""Training steps of every method from the cache, on constant targets and with its teacher called live."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from ...data.format.columns import MOMENTS, ColumnSpec, attention_source, column_name, source_of, split_column
from ...data.testing import synthetic_cache
from ...pipeline.encoders import load_encoder
from ...trainer.config import build
from ...trainer.input.online import is_target
from ...trainer.methods.aligning import PLAIN
from ...trainer.methods.outside import find_method
from ...trainer.run.checked import ProblemsError
from ...trainer.run.checks import attention_blocks, check
from ...trainer.run.fit import assemble, load_live
from ...trainer.run.identity import identity_of
from ...trainer.run.lightning_trainer import make_trainer, quiet_lightning
from ..shared.methods import backbone_for, chosen_methods
from .measured import Measured, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from lightning.pytorch import LightningModule, Trainer
    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.format.manifest import Manifest, Provenance
    from ...pipeline.encoders.base import Encoder
    from ...trainer.config import TrainConfig
    from ...trainer.input.online import LiveTargets
    from ...trainer.methods.base import Problem
    from .measured import BenchSettings

WARM_UP = 2
NONE = "none"
CACHED = "cached"
CONSTANT = "constant targets"


def bench_train(settings: BenchSettings, room: Path) -> tuple[str, str, list[Measured]]:
    """Measure images per second of whole training steps under Lightning.

    A step is loader, forward and backward pass, optimiser and EMA. Every method stands beside `none` on its
    own backbone.

    The lines with constant targets compute what the cached ones do, on targets that stay on the device: what
    a cached line has less is what reading its targets costs. A step of a warm-up has lines of its own, with
    its time beside that of a full step. The live teacher sees uint8 images that are
    already decoded, cropped and on the device: its lines have no decoding in them. A method that reads no
    teacher has neither. Cache, backbone and teacher have random values: they do not change the speed.

    Raises:
        ProblemsError: no method that reads a teacher can run with this model and teacher.
    """
    bench = _Bench(settings, room / "cache")
    variants = bench.variants()
    rates = interleaved({name: variant.measure for name, variant in variants.items()}, settings.rounds)
    lines = [
        Measured(
            name=name,
            rates=values,
            peak_bytes=bench.peaks.get(name, 0),
            baseline=variants[name].baseline,
            beside=name.replace(CACHED, CONSTANT) if name.endswith(CACHED) else "",
            full=variants[name].full,
        )
        for name, values in rates.items()
    ]
    what = (
        f"{settings.model}, teacher {settings.encoder}, {settings.side}², batch {settings.batch_size}"
        f"{', compiled' if settings.compile else ''}"
    )
    return f"training step: {what}{bench.left_out}", "images/s", lines


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """One line to measure.

    Attributes:
        measure: measures its rate once.
        baseline: name of the line without a method on the same backbone.
        full: name of the line of a whole step, of one of a warm-up.
    """

    measure: Callable[[], float]
    baseline: str
    full: str = ""


class _Bench:
    """A cache, a teacher, and what is measured with them."""

    def __init__(self, settings: BenchSettings, cache: Path) -> None:
        self._settings = settings
        self._cache = cache
        self._cuda = torch.cuda.is_available()
        self.peaks: dict[str, int] = {}
        self.left_out = ""
        before = torch.cuda.memory_allocated() if self._cuda else 0
        self._teacher = load_encoder(
            settings.encoder,
            resolution=settings.side,
            device="cuda" if self._cuda else "cpu",
            compute_dtype="bfloat16" if self._cuda else "float32",
            random_weights=settings.encoder != "demo",
        )
        self._teacher_bytes = torch.cuda.memory_allocated() - before if self._cuda else 0
        self._manifest = self._write_cache()
        self._constant = _Constant(self._manifest, settings.batch_size)
        self._live = _Live(self._manifest, settings, self._teacher)

    def variants(self) -> Mapping[str, _Variant]:
        """Return each line by name, the first of them without a method on the model that was asked for."""
        found: dict[str, _Variant] = {}
        left_out: dict[str, Sequence[Problem]] = {}
        self._add_baseline(found, self._settings.model)
        for name, kind in chosen_methods(self._settings.methods).items():
            if name == NONE:
                continue
            problems = check(self._config(name)).problems
            if problems:
                left_out[name] = problems
                continue
            baseline = self._add_baseline(found, backbone_for(kind, self._settings.model))
            self._add(found, name, baseline)
        if left_out and not any(name.endswith(CACHED) for name in found):
            raise ProblemsError([problem for each in left_out.values() for problem in each[:1]])
        self.left_out = "".join(f"; no {name}: {each[0].what}" for name, each in left_out.items())
        return found

    def _add_baseline(self, found: dict[str, _Variant], model: str) -> str:
        """Add the line without a method on a backbone, if it is not there, and return its name."""
        name = NONE if model == self._settings.model else f"{NONE}, {model}"
        if name not in found:
            measure = partial(self._rate, name, self._config(NONE, f"model={model}"), None)
            found[name] = _Variant(measure=measure, baseline=name)
        return name

    def _add(self, found: dict[str, _Variant], method: str, baseline: str) -> None:
        """Add the lines of a method, those of its warm-up first if it has one."""
        if "warmup_steps" in {item.name for item in fields(find_method(method).config_class)}:
            self._add_phase(found, f"{method} warm-up", method, baseline, full=method)
            self._add_phase(found, method, method, baseline, "method.warmup_steps=0")
        else:
            self._add_phase(found, method, method, baseline)

    def _add_phase(
        self,
        found: dict[str, _Variant],
        title: str,
        method: str,
        baseline: str,
        *assignments: str,
        full: str = "",
    ) -> None:
        """Add the lines of a method's first phase, and of the one in which it aligns no longer.

        Args:
            found: the lines.
            title: what the names of the lines begin with.
            method: its name.
            baseline: name of the line without a method.
            assignments: settings.
            full: title of the lines of whole steps, of those of a warm-up.
        """

        def add(name: str, config: TrainConfig, live: LiveTargets | None = None) -> None:
            measure = partial(self._rate, name, config, live)
            whole = name.replace(title, full) if full else ""
            found[name] = _Variant(measure=measure, baseline=baseline, full=whole)

        config = self._config(method, *assignments)
        checked = check(config)
        assert checked.method is not None, "the checks have passed"
        phases = checked.method.phases()
        if not any(map(is_target, checked.method.columns(phases[0]))):
            add(title, config)
            return
        online = self._config(method, *assignments, targets="online")
        add(f"{title}, {CONSTANT}", online, self._constant)
        add(f"{title}, {CACHED}", config)
        add(f"{title}, teacher live", online, self._live)
        if phases[-1].name == PLAIN:
            add(f"{title} after τ", self._config(method, *assignments, "method.stop=1"))

    def _config(self, method: str, *assignments: str, targets: str = "cache") -> TrainConfig:
        flags = {
            "method": method,
            "cache": str(self._cache),
            "targets": targets,
            "model": backbone_for(find_method(method), self._settings.model),
            "batch_size": self._settings.batch_size,
            "max_steps": WARM_UP + self._settings.steps,
            "compile": self._settings.compile,
        }
        return build(flags=flags, assignments=assignments)

    def _write_cache(self) -> Manifest:
        """Write latents, tokens and class token in float16, and the attention that haste would have."""
        teacher, side = self._teacher, self._settings.side // 8
        tokens = teacher.grid[0] * teacher.grid[1]
        columns = {
            MOMENTS: ColumnSpec(shape=(8, side, side), dtype="float32"),
            column_name(teacher.name, "patch"): ColumnSpec(shape=(tokens, teacher.width), dtype="float16"),
            column_name(teacher.name, "cls"): ColumnSpec(shape=(teacher.width,), dtype="float16"),
        }
        write = partial(
            synthetic_cache,
            self._cache,
            num_rows=max(4 * self._settings.batch_size, 64),
            shard_rows=64,
            grid=teacher.grid,
            resolution=self._settings.side,
        )
        manifest = write(columns=columns)
        blocks = attention_blocks(self._config("haste"))
        if not blocks or blocks[-1] > teacher.depth:
            return manifest
        spec = ColumnSpec(shape=(len(blocks), teacher.heads, tokens, teacher.head_width), dtype="float16")
        notes = {"blocks": list(blocks), "depth": teacher.depth, "logit_scale": teacher.logit_scale}
        return write(
            columns={column_name(teacher.name, kind): spec for kind in ("q", "k")},
            notes={attention_source(teacher.name): notes},
        )

    def _rate(self, name: str, config: TrainConfig, live: LiveTargets | None) -> float:
        before = torch.cuda.memory_allocated() if self._cuda else 0
        checked = check(config, live)
        if checked.problems:
            raise ProblemsError(checked.problems)
        load_live(checked, lambda line: None)
        module, data = assemble(config, checked, identity_of(checked, config))
        clock = _StepClock()
        trainer = make_trainer(config, callbacks=[clock])
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        with quiet_lightning():
            trainer.fit(module, datamodule=data)
        if self._cuda:
            # the teacher always lies there: it counts for the lines that call it
            teacher = self._teacher_bytes if isinstance(live, _Live) else 0
            self.peaks[name] = torch.cuda.max_memory_allocated() - before + teacher
        return self._settings.steps * self._settings.batch_size / clock.elapsed


class _StepClock(Callback):
    """Seconds from the end of the warm-up to the end of the last step."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self._started = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step not in (WARM_UP, trainer.max_steps):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        if trainer.global_step == WARM_UP:
            self._started = time.perf_counter()
        else:
            self.elapsed = time.perf_counter() - self._started


class _Targets:
    """What the two stand-ins for `LiveTargets` have in common, which is the targets of the cache by name."""

    def __init__(self, manifest: Manifest) -> None:
        self.columns = {name: spec for name, spec in manifest.columns.items() if is_target(name)}
        self.sources = {source_of(name): manifest.sources[source_of(name)] for name in self.columns}
        self.grids = {source: each.grid for source, each in self.sources.items()}
        self.notes = {source: each.notes for source, each in self.sources.items()}
        self.record: Mapping[str, Any] = {}
        self.device = torch.device("cpu")

    def load(self, device: torch.device) -> Mapping[str, Provenance]:
        self.device = device
        return self.sources

    def prepare(self, rows: NDArray[np.int64]) -> None:
        """Do nothing, as there is nothing to decode."""


class _Constant(_Targets):
    """The same targets for every batch, on the device, in the dtype that the cache stores."""

    def __init__(self, manifest: Manifest, batch_size: int) -> None:
        super().__init__(manifest)
        generator = torch.Generator().manual_seed(0)
        self._values = {
            name: torch.randn((batch_size, *spec.shape), generator=generator).to(torch.float16)
            for name, spec in self.columns.items()
        }

    def __call__(
        self, rows: NDArray[np.int64], names: Sequence[str], views: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        del rows, views
        self._values |= {name: self._values[name].to(self.device) for name in names}
        return {name: self._values[name] for name in names}


class _Live(_Targets):
    """The teacher on the same images in every batch. They are on the device already."""

    def __init__(self, manifest: Manifest, settings: BenchSettings, teacher: Encoder) -> None:
        super().__init__(manifest)
        self.columns = {name: replace(spec, dtype="float32") for name, spec in self.columns.items()}
        side = settings.side
        generator = torch.Generator().manual_seed(0)
        shape = (settings.batch_size, 3, side, side)
        self._images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self._teacher = teacher

    def __call__(
        self, rows: NDArray[np.int64], names: Sequence[str], views: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        del rows, views
        self._images = self._images.to(self.device)
        kinds = {split_column(name)[1]: name for name in names}
        noted = self.notes.get(attention_source(self._teacher.name), {})
        blocks = tuple(noted["blocks"]) if "q" in kinds else ()
        features = self._teacher.encode(self._images, attention=blocks)
        # clones are not of inference mode, beside whose tensors no gradient may be computed
        return {name: features[kind].clone() for kind, name in kinds.items()}
