"""What a benchmark measures, in turn, and how its figures are shown."""

from __future__ import annotations

import gc
import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import Console

    from ...trainer.compiling import Compile

    Column = Callable[["Measured"], str]

METHODS = "none,repa,haste,irepa,reg,urepa,sra,sra2,erw,gmem"
DEFAULT_RESOLUTION = 64
MOST_COLUMNS = 8
UNCOUNTED = 1
"""Turns before those that count, for what is done once only."""
_NAME_WIDTH = 16
TARGETS: Mapping[str, str] = {
    "constant": "constant targets",
    "cached": "cached",
    "live": "teacher live",
}
"""Where the targets of a measured step come from → what its line is called."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured.

    Attributes:
        model: backbone of the training step.
        encoder: teacher; of the training step and of preprocess its weights are random.
        resolution: side in pixels of the images; None: 64, of fidelity as `repa preprocess` has it.
        batch_size: images of a training step and of a forward pass.
        images: images that preprocess encodes in a round; those that fidelity takes its own from.
        rows: rows of the cache that is read or written.
        processes: of loader: processes that read at the same time, as ranks of a training; 1 measures one
            process in more ways.
        steps: training steps of a round.
        rounds: rounds; every figure is the median over them.
        methods: names between commas of the methods whose training steps are measured.
        targets: where the targets of these steps come from, some of `TARGETS` between commas.
        compile: what is compiled of them, as of the setting.
        data: of fidelity: the images, as of `repa preprocess`.
        attention: of fidelity: the teacher's blocks, as of `repa preprocess`; None: HASTE's, scaled to its
            depth.
        weights: of fidelity: ``NAME=FILE`` of the teacher's weights.
        random_weights: of fidelity: draw the teacher's weights.
    """

    model: str = "SiT-T/1"
    encoder: str = "demo"
    resolution: int | None = None
    batch_size: int = 32
    images: int = 256
    rows: int = 2048
    processes: int = 1
    steps: int = 10
    rounds: int = 5
    methods: str = METHODS
    targets: str = ",".join(TARGETS)
    compile: Compile = "auto"
    data: str | None = None
    attention: str | None = None
    weights: tuple[str, ...] = ()
    random_weights: bool = False

    @property
    def side(self) -> int:
        """Side in pixels of images that nobody gives."""
        return DEFAULT_RESOLUTION if self.resolution is None else self.resolution

    @property
    def measured_targets(self) -> tuple[str, ...]:
        """What the lines of the chosen targets are called, each once, in the order of `TARGETS`."""
        chosen = self.targets.split(",")
        return tuple(title for name, title in TARGETS.items() if name in chosen)

    def __post_init__(self) -> None:
        for name in ("resolution", "batch_size", "images", "rows", "processes", "steps", "rounds"):
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if value is not None and value < 1:
                raise RepaError(f"{flag} {value} is too small", "give at least 1", field=flag)
        unknown = [name for name in self.targets.split(",") if name not in TARGETS]
        if unknown:
            raise RepaError(
                f"--targets has {unknown[0]!r}",
                f"give some of {','.join(TARGETS)}",
                field="--targets",
            )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One line of a table, with the rate of every round and what it is compared with.

    Attributes:
        name: what was measured.
        rates: items per second, one a round.
        bytes_per_item: for the GB/s column; 0 leaves it empty.
        peak_bytes: most memory of the GPU at any time; 0 if that was not measured.
        baseline: name of the line that it is compared with; empty is the first.
        beside: name of another line that it is compared with as well.
        full: name of the line of a whole step, of one that leaves out blocks.
        repa: name of the line of REPA's step, of a step of another method that aligns.
        bare_turns: what a turn of the bare loop took of a turn of this, on the wall and of the CPU; empty
            without.
        flops: of an item; 0 if they were not counted.
        peak_flops: FLOP/s that the maker of the GPU states; 0 if no table has it.
        products: FLOP/s of a large matrix product, one a round; empty if that was not measured.
        own_bytes: most memory of its own that one of several processes took; 0 if that was not measured.
        open_files: most descriptors that one of several processes held; 0 likewise.
        opening_seconds: longest that one of several processes took before it could read; 0 likewise.
        cpu_per_1000: CPU seconds of 1,000 items, one a round; empty if that was not measured.
        fidelity: what storing it changes, see `attention_summary` and `token_fidelity`; empty of what is not
            stored.
    """

    name: str
    rates: tuple[float, ...]
    bytes_per_item: int = 0
    peak_bytes: int = 0
    baseline: str = ""
    beside: str = ""
    full: str = ""
    repa: str = ""
    bare_turns: tuple[tuple[float, float], ...] = ()
    flops: float = 0.0
    peak_flops: float = 0.0
    products: tuple[float, ...] = ()
    own_bytes: int = 0
    open_files: int = 0
    opening_seconds: float = 0.0
    cpu_per_1000: tuple[float, ...] = ()
    fidelity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median rate."""
        return statistics.median(self.rates)

    def ratio(self, reference: Measured) -> float:
        """Median over the rounds of this rate by the reference's in the same round."""
        return statistics.median(a / b for a, b in zip(self.rates, reference.rates, strict=True))

    @property
    def of_bare(self) -> float:
        """Median over the turns of this rate by the bare loop's, 0 without."""
        return statistics.median(wall for wall, _ in self.bare_turns) if self.bare_turns else 0.0

    @property
    def of_bare_cpu(self) -> float:
        """Median over the turns of the bare loop's CPU time by this line's, 0 without."""
        return statistics.median(cpu for _, cpu in self.bare_turns) if self.bare_turns else 0.0

    @property
    def utilisation(self) -> float:
        """MFU, the share of the stated peak that the median rate reaches, 0 where it is not known."""
        return self.median * self.flops / self.peak_flops if self.peak_flops else 0.0

    @property
    def of_product(self) -> float:
        """Median over the rounds of the share of the matrix product's FLOP/s, 0 if it was not measured."""
        if not self.products:
            return 0.0
        shares = (
            rate * self.flops / product for rate, product in zip(self.rates, self.products, strict=True)
        )
        return statistics.median(shares)


def interleaved(
    variants: Mapping[str, Callable[[], float]], rounds: int, *, warm: bool = False
) -> dict[str, tuple[float, ...]]:
    """Measure the rates of every variant in turn A B C, A B C …, after uncounted turns.

    Args:
        variants: name → measures its rate once.
        rounds: turns that count.
        warm: each variant itself leaves out what it does once only, and every turn counts.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(0 if warm else -UNCOUNTED, rounds):
        for name, measure in variants.items():
            gc.collect()  # Lightning's trainers and modules refer to one another: gigabytes would pile up
            rate = measure()
            if number >= 0:
                rates[name].append(rate)
    return {name: tuple(values) for name, values in rates.items()}


def describe_machine() -> str:
    """Name the processor, cores, device and versions that a figure needs beside it."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{_processor()}, {cores} cores, {device}; "
        f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def print_table(console: Console, title: str, unit: str, lines: Sequence[Measured]) -> None:
    """Print the lines of one table, each beside the first.

    Where that makes too many columns for a terminal the ratios have a table of their own.
    """
    rates, ratios = _shown(_rate_columns(unit), lines), _shown(_ratio_columns(lines), lines)
    if len(rates) + len(ratios) <= MOST_COLUMNS:
        _print(console, title, {**rates, **ratios}, lines)
        return
    _print(console, title, rates, lines)
    _print(console, "the same, in ratios", ratios, lines)


def _rate_columns(unit: str) -> dict[str, Column]:
    return {
        f"{unit} (median)": lambda line: f"{line.median:,.1f}",
        "lowest": lambda line: f"{min(line.rates):,.1f}",
        "highest": lambda line: f"{max(line.rates):,.1f}",
        "GB/s": lambda line: _figure(line.median * line.bytes_per_item / 1e9, 2),
        "CPU s / 1,000": lambda line: (
            f"{statistics.median(line.cpu_per_1000):.3f}" if line.cpu_per_1000 else ""
        ),
        "peak GB": lambda line: _figure(line.peak_bytes / 1e9, 2),
        "MB each": lambda line: _figure(line.own_bytes / 1e6, 0),
        "files each": lambda line: _figure(line.open_files, 0),
        "opening s": lambda line: _figure(line.opening_seconds, 2),
        "GFLOP an image": lambda line: _figure(line.flops / 1e9, 1),
        "TFLOP/s": lambda line: _figure(line.median * line.flops / 1e12, 3),
    }


def _ratio_columns(lines: Sequence[Measured]) -> dict[str, Column]:
    by_name = {line.name: line for line in lines}
    baseline = "of the line without a method" if any(line.baseline for line in lines) else "of the first line"
    return {
        baseline: lambda line: f"{line.ratio(by_name[line.baseline or lines[0].name]):.3f}",
        "of constant targets": lambda line: f"{line.ratio(by_name[line.beside]):.3f}" if line.beside else "",
        "time of a full step": lambda line: f"{by_name[line.full].ratio(line):.3f}" if line.full else "",
        "time of REPA's step": lambda line: f"{by_name[line.repa].ratio(line):.3f}" if line.repa else "",
        "of the bare loop": lambda line: _figure(line.of_bare, 3),
        "the same in CPU time": lambda line: _figure(line.of_bare_cpu, 3),
        "of a matrix product": lambda line: _figure(line.of_product, 3),
        "MFU": lambda line: _figure(line.utilisation, 3),
    }


def _figure(value: float, digits: int) -> str:
    """Return a figure, nothing of one that was not measured."""
    return f"{value:,.{digits}f}" if value else ""


def _shown(columns: Mapping[str, Column], lines: Sequence[Measured]) -> dict[str, Column]:
    """Return the columns in which some line has a figure."""
    return {heading: text for heading, text in columns.items() if any(map(text, lines))}


def _print(console: Console, title: str, columns: Mapping[str, Column], lines: Sequence[Measured]) -> None:
    from rich.table import Table

    from ..shared.terminal import print_figures

    table = Table(title=title, title_justify="left")
    table.add_column("", min_width=min(_NAME_WIDTH, max(len(line.name) for line in lines)))
    for heading in columns:
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(line.name, *(text(line) for text in columns.values()))
    print_figures(console, table)
