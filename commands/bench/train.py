"""Training steps of every method from the cache, on constant targets and with its teacher called live."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ...data.format.columns import MOMENTS, ColumnSpec, attention_source, column_name
from ...data.testing import synthetic_cache
from ...pipeline.encoders import load_encoder
from ...trainer.compiling import chosen
from ...trainer.config import build
from ...trainer.input.online import is_target
from ...trainer.methods.aligning import PLAIN
from ...trainer.methods.outside import find_method
from ...trainer.run.arithmetic import float32_products
from ...trainer.run.assembly import assemble
from ...trainer.run.callbacks import Clock, Metrics
from ...trainer.run.checked import ProblemsError
from ...trainer.run.checks import attention_blocks, check
from ...trainer.run.fit import load_live
from ...trainer.run.identity import identity_of
from ...trainer.run.lightning_trainer import make_trainer, quiet_lightning
from ...trainer.run.loggers import Reports
from ...trainer.run.utilisation import TERA, known_peak
from ..shared.methods import backbone_for, chosen_methods
from .arithmetic import SIDE, counted_flops, product_flops
from .bare import StepClock, can_be_bare
from .measured import TARGETS, Measured, interleaved
from .stand_ins import ConstantTargets, LiveTeacher

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ...data.format.manifest import Manifest
    from ...trainer.config import TrainConfig
    from ...trainer.input.online import LiveTargets
    from ...trainer.methods.base import Problem
    from .bare import Seconds
    from .measured import BenchSettings

WARM_UP = 2
NONE = "none"
REPA = "repa"
CONSTANT, CACHED, LIVE = TARGETS.values()
BARE = "bare loop"
PRODUCT = "matrix product"


def bench_train(settings: BenchSettings, room: Path) -> tuple[str, str, list[Measured]]:
    """Measure images per second of whole training steps under Lightning.

    A step is loader, draws, forward and backward pass, optimiser, EMA, means and the row of metrics. Every
    method stands beside `none` on its own backbone.

    The lines with constant targets compute what the cached ones do, on targets that stay on the device: what
    a cached line has less is what reading its targets costs. A step of a warm-up has lines of its own, with
    its time beside that of a full step. The live teacher sees uint8 images that are
    already decoded, cropped and on the device: its lines have no decoding in them. A method that reads no
    teacher has neither. Cache, backbone and teacher have random values: they do not change the speed.

    The bare loop takes turns with the steps from the cache, see `BareLoop`. The FLOP/s are those of MFU's
    formula, beside the peak that the GPU's maker states, or else beside those of a large matrix product.

    Raises:
        ProblemsError: no method that reads a teacher can run with this model and teacher.
    """
    bench = _Bench(settings, room)
    variants = bench.variants()
    turns = {PRODUCT: bench.product, **{name: variant.measure for name, variant in variants.items()}}
    # their clocks start after steps that do not count: turns of them would double the time for nothing
    rates = interleaved(turns, settings.rounds, warm=True)
    products = rates.pop(PRODUCT)
    lines = [
        line for name, values in rates.items() for line in bench.lines(name, variants[name], values, products)
    ]
    found = {line.name: line for line in lines}
    lines = [_compared(line, found) for line in lines]
    side = SIDE[bench.device.type]
    what = (
        f"{settings.model}, teacher {settings.encoder}, {settings.side}², batch {settings.batch_size}"
        f", compile {bench.compiled}; {max(products) / TERA:.3f} TFLOP/s in a product of "
        f"matrices {side}²"
    )
    return f"training step: {what}{bench.left_out}", "images/s", lines


def _compared(line: Measured, found: Mapping[str, Measured]) -> Measured:
    """Return a line without what it is compared with where that was not measured on its network."""

    def present(name: str) -> str:
        return name if name in found and found[name].baseline == line.baseline else ""

    return replace(line, beside=present(line.beside), full=present(line.full), repa=present(line.repa))


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


@dataclass(kw_only=True)
class _Seen:
    """What measuring a line has shown beside its rates.

    Attributes:
        clocks: of every turn.
        flops: of an image; 0 where they cannot be counted.
        peak_bytes: most memory of the GPU.
    """

    clocks: list[StepClock] = field(default_factory=list)
    flops: float = 0.0
    peak_bytes: int = 0


class _Bench:
    """A cache, a teacher, and what is measured with them."""

    def __init__(self, settings: BenchSettings, room: Path) -> None:
        self._settings = settings
        self._cache, self._run = room / "cache", room / "run"
        self._cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self._cuda else "cpu")
        self._seen: dict[str, _Seen] = {}
        self.left_out = ""
        before = torch.cuda.memory_allocated() if self._cuda else 0
        self._teacher = load_encoder(
            settings.encoder,
            resolution=settings.side,
            device=str(self.device),
            compute_dtype="bfloat16" if self._cuda else "float32",
            random_weights=settings.encoder != "demo",
        )
        self._teacher_bytes = torch.cuda.memory_allocated() - before if self._cuda else 0
        self._manifest = self._write_cache()
        self._plain = self._config(NONE)
        self._constant = ConstantTargets(self._manifest, settings.batch_size)
        self._live = LiveTeacher(self._manifest, settings, self._teacher)

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
        if left_out and not any(name.endswith((CONSTANT, CACHED, LIVE)) for name in found):
            raise ProblemsError(list(dict.fromkeys(each[0] for each in left_out.values())))
        self.left_out = "".join(f"; no {name}: {each[0].what}" for name, each in left_out.items())
        return found

    def _add_baseline(self, found: dict[str, _Variant], model: str) -> str:
        """Add the line without a method on a backbone, if it is not there, and return its name."""
        name = NONE if model == self._settings.model else f"{NONE}, {model}"
        if name not in found:
            config = self._config(NONE, f"model={model}")
            measure = partial(self._rate, name, config, None, bare=True)
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

        def add(
            name: str, config: TrainConfig, live: LiveTargets | None = None, *, bare: bool = False
        ) -> None:
            measure = partial(self._rate, name, config, live, bare=bare)
            whole = name.replace(title, full) if full else ""
            found[name] = _Variant(measure=measure, baseline=baseline, full=whole)

        config = self._config(method, *assignments)
        checked = check(config)
        assert checked.method is not None, "the checks have passed"
        phases = checked.method.phases()
        if not any(map(is_target, checked.method.columns(phases[0]))):
            add(title, config, bare=True)
            return
        online = self._config(method, *assignments, targets="online")
        lines: dict[str, Callable[[str], None]] = {
            CONSTANT: lambda name: add(name, online, self._constant),
            CACHED: lambda name: add(name, config, bare=True),
            LIVE: lambda name: add(name, online, self._live),
        }
        for targets in self._settings.measured_targets:
            lines[targets](f"{title}, {targets}")
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

    def product(self) -> float:
        """Measure the FLOP/s of a matrix product."""
        return product_flops(self.device, self._plain)

    @property
    def compiled(self) -> str:
        """What is compiled, ``off`` for nothing."""
        return chosen(self._plain.compile, self.device.type)

    def lines(
        self, name: str, variant: _Variant, rates: tuple[float, ...], products: tuple[float, ...]
    ) -> list[Measured]:
        """Return the line of a variant, and after it that of its bare loop if it has one.

        Args:
            name: of the variant.
            variant: as of `variants`.
            rates: images per second of the rounds.
            products: FLOP/s of the matrix product in the rounds.
        """
        seen, method = self._seen[name], name.removesuffix(f", {CACHED}")
        clocks = seen.clocks[-len(rates) :]
        shared: Mapping[str, Any] = {
            "baseline": variant.baseline,
            "flops": seen.flops,
            "peak_flops": known_peak(self._plain, self.device) or 0.0,
            "products": products,
        }
        own = Measured(
            name=name,
            rates=rates,
            cpu_per_1000=tuple(self._cpu_per_1000(clock.own) for clock in clocks),
            peak_bytes=seen.peak_bytes,
            beside=name.replace(CACHED, CONSTANT) if name.endswith(CACHED) else "",
            full=variant.full,
            repa=f"{REPA}, {CACHED}" if name.endswith(CACHED) and method != REPA else "",
            bare_turns=tuple(ratio for clock in clocks for ratio in clock.ratios()),
            **shared,
        )
        if not own.bare_turns:
            return [own]
        bare = Measured(
            name=f"{method}, {BARE}",
            rates=tuple(self._images / sum(clock.bare.wall) for clock in clocks),
            cpu_per_1000=tuple(self._cpu_per_1000(clock.bare) for clock in clocks),
            **shared,
        )
        return [own, bare]

    @property
    def _images(self) -> int:
        """Images of a turn."""
        return self._settings.steps * self._settings.batch_size

    def _cpu_per_1000(self, seconds: Seconds) -> float:
        return 1000 * sum(seconds.cpu) / self._images

    def _rate(self, name: str, config: TrainConfig, live: LiveTargets | None, *, bare: bool) -> float:
        before = torch.cuda.memory_allocated() if self._cuda else 0
        checked = check(config, live)
        if checked.problems:
            raise ProblemsError(checked.problems)
        load_live(checked, lambda line: None)
        module, data = assemble(config, checked, identity_of(checked, config))
        seen, phase = self._seen.setdefault(name, _Seen()), module.method.phase_at(WARM_UP)
        if not seen.clocks:
            seen.flops = counted_flops(module, phase)
        clock = StepClock(warm_up=WARM_UP, bare=bare and can_be_bare(module, phase))
        seen.clocks.append(clock)
        run = self._run / f"{len(seen.clocks)} {name}"
        run.mkdir(parents=True)
        metrics = Metrics(
            config, run, Console(file=StringIO()), Clock(), (), Reports(config, lambda line: None)
        )
        trainer = make_trainer(config, run=run, callbacks=[metrics, clock])
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        with quiet_lightning(), float32_products(config):
            trainer.fit(module, datamodule=data)
        if self._cuda:
            # the teacher always lies there: it counts for the lines that call it
            teacher = self._teacher_bytes if isinstance(live, LiveTeacher) else 0
            seen.peak_bytes = torch.cuda.max_memory_allocated() - before + teacher
        return self._images / sum(clock.own.wall)
