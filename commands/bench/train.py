"""Training steps without a method, with REPA and HASTE from the cache, and with their teacher called live."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from ...data.format.columns import MOMENTS, ColumnSpec, attention_source, column_name, source_of, split_column
from ...data.testing import synthetic_cache
from ...pipeline.encoders import load_encoder
from ...trainer.config import build
from ...trainer.input.online import is_target
from ...trainer.run.checked import ProblemsError
from ...trainer.run.checks import attention_blocks, check
from ...trainer.run.fit import assemble, load_live
from ...trainer.run.identity import identity_of
from ...trainer.run.lightning_trainer import make_trainer, quiet_lightning
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
    from .measured import BenchSettings

WARM_UP = 2
CONSTANT = "constant targets"


def bench_train(settings: BenchSettings, room: Path) -> tuple[str, str, list[Measured]]:
    """Measure images per second of whole training steps under Lightning.

    A step is loader, forward and backward pass, optimiser and EMA.

    The lines with constant targets compute what the cached ones do, on targets that stay on the device: what
    a cached line has less is what reading its targets costs. The live teacher sees uint8 images that are
    already decoded, cropped and on the device: its lines have no decoding in them. Cache, backbone and
    teacher have random values: they do not change the speed.
    """
    bench = _Bench(settings, room / "cache")
    rates = interleaved(bench.variants(), settings.rounds)
    lines = [
        Measured(
            name=name,
            rates=values,
            peak_bytes=bench.peaks.get(name, 0),
            beside=name.replace("cached", CONSTANT) if name.endswith("cached") else "",
        )
        for name, values in rates.items()
    ]
    what = (
        f"{settings.model}, teacher {settings.encoder}, {settings.resolution}², batch {settings.batch_size}"
    )
    return f"training step: {what}{bench.left_out}", "images/s", lines


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
            resolution=settings.resolution,
            device="cuda" if self._cuda else "cpu",
            compute_dtype="bfloat16" if self._cuda else "float32",
            random_weights=settings.encoder != "demo",
        )
        self._teacher_bytes = torch.cuda.memory_allocated() - before if self._cuda else 0
        self._manifest = self._write_cache()

    def variants(self) -> Mapping[str, Callable[[], float]]:
        """Name → what measures its rate once."""
        methods = ["repa", "haste"]
        problems = check(self._config("haste")).problems
        if problems:
            self.left_out = f"; no haste: {problems[0].what}"
            methods.remove("haste")
        targets = {
            CONSTANT: _Constant(self._manifest, self._settings.batch_size),
            "cached": None,
            "teacher live": _Live(self._manifest, self._settings, self._teacher),
        }
        found = {"none": partial(self._rate, "none", self._config("none"), None)}
        for method in methods:
            for name, live in targets.items():
                title = f"{method}, {name}"
                config = self._config(method, targets="cache" if live is None else "online")
                found[title] = partial(self._rate, title, config, live)
        if "haste" in methods:
            after = self._config("haste", "method.stop=1")
            found["haste after τ"] = partial(self._rate, "haste after τ", after, None)
        return found

    def _config(self, method: str, *assignments: str, targets: str = "cache") -> TrainConfig:
        flags = {
            "method": method,
            "cache": str(self._cache),
            "targets": targets,
            "model": self._settings.model,
            "batch_size": self._settings.batch_size,
            "max_steps": WARM_UP + self._settings.steps,
        }
        return build(flags=flags, assignments=assignments)

    def _write_cache(self) -> Manifest:
        """Write latents, tokens in float16, and the attention that haste would have of this teacher."""
        teacher, side = self._teacher, self._settings.resolution // 8
        tokens = teacher.grid[0] * teacher.grid[1]
        columns = {
            MOMENTS: ColumnSpec(shape=(8, side, side), dtype="float32"),
            column_name(teacher.name, "patch"): ColumnSpec(shape=(tokens, teacher.width), dtype="float16"),
        }
        write = partial(
            synthetic_cache,
            self._cache,
            num_rows=max(4 * self._settings.batch_size, 64),
            shard_rows=64,
            grid=teacher.grid,
            resolution=self._settings.resolution,
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

    def __call__(self, rows: NDArray[np.int64], names: Sequence[str]) -> dict[str, Tensor]:
        del rows
        self._values |= {name: self._values[name].to(self.device) for name in names}
        return {name: self._values[name] for name in names}


class _Live(_Targets):
    """The teacher on the same images in every batch. They are on the device already."""

    def __init__(self, manifest: Manifest, settings: BenchSettings, teacher: Encoder) -> None:
        super().__init__(manifest)
        self.columns = {name: replace(spec, dtype="float32") for name, spec in self.columns.items()}
        side = settings.resolution
        generator = torch.Generator().manual_seed(0)
        shape = (settings.batch_size, 3, side, side)
        self._images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self._teacher = teacher

    def __call__(self, rows: NDArray[np.int64], names: Sequence[str]) -> dict[str, Tensor]:
        del rows
        self._images = self._images.to(self.device)
        kinds = {split_column(name)[1]: name for name in names}
        noted = self.notes.get(attention_source(self._teacher.name), {})
        blocks = tuple(noted["blocks"]) if "q" in kinds else ()
        features = self._teacher.encode(self._images, attention=blocks)
        # clones are not of inference mode, beside whose tensors no gradient may be computed
        return {name: features[kind].clone() for kind, name in kinds.items()}
