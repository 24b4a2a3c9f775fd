"""The loaders of several ranks of one machine, against as many processes that only copy."""

from __future__ import annotations

import mmap
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...data.reading.loader import CacheLoader
from ...data.reading.order import permutation
from ...data.reading.reader import CacheReader
from ..measure.together import Place, Processes, Share, Stopwatch, open_descriptors, own_memory, processes
from .forms import FORMS
from .loader import BATCH_SIZE, LoaderBench, read_whole, thread_count
from .measured import Measured, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..measure.together import Together
    from .measured import BenchSettings

THREADS = (1, 2)
EPOCHS = 4
"""Passes over the rows in a warm measurement, for one would be short."""


def bench_ranks(settings: BenchSettings, room: Path) -> Iterator[tuple[str, str, list[Measured]]]:
    """Measure random rows per second of all ranks together, each in batches of 64 of one global order.

    There is a table for each form and state. Ranks wait for one another after every batch, as in a training;
    the processes of the limit do not.

    Warm, the limit is as many processes, each copying whole rows from a memory map of its own into one reused
    batch buffer; cold, as many, each reading its share of the shards in sequence past the page cache.
    """
    count = settings.processes
    rows = max(settings.rows, count * BATCH_SIZE) // (count * BATCH_SIZE) * count * BATCH_SIZE
    with processes(count, preload=[__name__]) as started:
        for form, columns in FORMS.items():
            bench = LoaderBench(room / form, columns, rows)
            what = (
                f"loader: {form}, {rows:,} rows of {bench.row_bytes:,} bytes, {count} processes, "
                f"batch {count} × {BATCH_SIZE}"
            )
            lines = measure_lines(warm_variants(bench, started), bench.row_bytes, settings.rounds)
            yield f"{what}, page cache warm", "rows/s", lines
            state = "cold" if bench.can_drop() else "NOT cold, it cannot be emptied here"
            lines = measure_lines(cold_variants(bench, started), bench.row_bytes, settings.rounds)
            yield f"{what}, page cache {state}; {_sharing(bench, started)}", "rows/s", lines
            shutil.rmtree(room / form)


def measure_lines(variants: dict[str, Callable[[], Together]], row_bytes: int, rounds: int) -> list[Measured]:
    """Measure every variant in turn, in all processes at once.

    Args:
        variants: name → what measures.
        row_bytes: of a row.
        rounds: that count.
    """
    found: dict[str, list[Together]] = {name: [] for name in variants}

    def rate(name: str) -> float:
        found[name].append(variants[name]())
        return found[name][-1].rate

    rates = interleaved({name: partial(rate, name) for name in variants}, rounds)
    lines = []
    for name, values in rates.items():
        counted = found[name][-rounds:]
        shares = [share for together in counted for share in together.shares]
        lines.append(
            Measured(
                name=name,
                rates=values,
                bytes_per_item=row_bytes,
                cpu_per_1000=tuple(together.cpu_per_1000 for together in counted),
                own_bytes=max(share.memory for share in shares),
                open_files=max(share.open_files for share in shares),
                opening_seconds=max(share.opening for share in shares),
            )
        )
    return lines


def warm_variants(bench: LoaderBench, started: Processes) -> dict[str, Callable[[], Together]]:
    """Return what measures reading out of the page cache, the limit first."""
    variants: dict[str, Callable[[], Together]] = {
        f"copy from memory maps, {started.count} processes (limit)": partial(
            started.measure, Copying(bench.plain, bench.row_bytes)
        )
    }
    for threads in THREADS:
        for check_crc in (False, True):
            reading = Reading(bench.cache, tuple(bench.columns), threads, check_crc=check_crc, warm=True)
            name = f"repa, {started.count} × {thread_count(threads)}, crc32c {'on' if check_crc else 'off'}"
            variants[name] = partial(started.measure, reading)
    return variants


def cold_variants(bench: LoaderBench, started: Processes) -> dict[str, Callable[[], Together]]:
    """Return what measures reading from the disk, the limit first."""
    measured: dict[str, InSequence | Reading] = {
        f"sequential O_DIRECT reads, {started.count} processes (limit)": InSequence(
            tuple(bench.shards), bench.row_bytes
        )
    }
    for threads in THREADS:
        for direct in ("on", "off"):
            way = "O_DIRECT" if direct == "on" else "page cache"
            name = f"repa, {started.count} × {thread_count(threads)}, {way}"
            measured[name] = Reading(bench.cache, tuple(bench.columns), threads, direct=direct)

    def dropped(measuring: InSequence | Reading) -> Together:
        bench.drop()
        return started.measure(measuring)

    return {name: partial(dropped, measuring) for name, measuring in measured.items()}


def _sharing(bench: LoaderBench, started: Processes) -> str:
    """Say by how much the page cache grows while all processes read all of the cache between them."""
    bench.drop()
    before = cached_bytes()
    # each an epoch of its own order: every row is read by several of them, at other times
    started.measure(Reading(bench.cache, tuple(bench.columns), 1, alone=True))
    grown = cached_bytes() - before
    total = sum(path.stat().st_size for path in bench.shards)
    return (
        f"it grew by {grown / 1e6:,.0f} MB when each of {started.count} processes read all "
        f"{total / 1e6:,.0f} MB of the shards"
    )


def cached_bytes() -> int:
    """Return the bytes of files in the page cache of this machine.

    Zero where nothing says how many.
    """
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("Cached:")).split()[1])
    return 0


@dataclass(frozen=True)
class Copying:
    """Copies of this process's rows of a plain file, from a memory map into one reused batch buffer.

    Attributes:
        plain: file of uint8 ``[rows, row_bytes]``.
        row_bytes: of a row.
    """

    plain: Path
    row_bytes: int

    def __call__(self, place: Place) -> Share:
        """Copy, once every page of the map is there."""
        header = np.load(self.plain, mmap_mode="r")
        with open(self.plain, "rb") as file:
            memory = mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ
            )
        rows = np.frombuffer(memory, np.uint8, offset=header.offset).reshape(header.shape)
        buffer = np.ones((BATCH_SIZE, self.row_bytes), dtype=np.uint8)
        orders = [
            permutation(0, epoch, len(rows)).reshape(-1, place.count, BATCH_SIZE)[:, place.number]
            for epoch in range(EPOCHS)
        ]
        seen = 0
        with Stopwatch(place) as watch:
            for batch in np.concatenate(orders):
                for position, row in enumerate(batch):
                    buffer[position] = rows[row]
                seen += len(batch)
        return watch.share(seen)


@dataclass(frozen=True)
class InSequence:
    """Sequential reads past the page cache of this process's share of some files.

    Attributes:
        files: all of them.
        row_bytes: of a row.
    """

    files: tuple[Path, ...]
    row_bytes: int

    def __call__(self, place: Place) -> Share:
        """Read every file that is this process's turn."""
        with Stopwatch(place) as watch:
            total = sum(map(read_whole, self.files[place.number :: place.count]))
        return watch.share(total // self.row_bytes)


@dataclass(frozen=True)
class Reading:
    """The micro-batches of one rank, in step with the others.

    Attributes:
        cache: its folder.
        columns: to read.
        threads: that read.
        check_crc: compare every row with its checksum.
        direct: read past the page cache, on or off.
        warm: an epoch passes before the clock runs, then `EPOCHS` are read; otherwise one from the start.
        alone: whether this process reads all rows, in an order of its own.
    """

    cache: Path
    columns: tuple[str, ...]
    threads: int
    check_crc: bool = True
    direct: str = "off"
    warm: bool = False
    alone: bool = False

    def __call__(self, place: Place) -> Share:
        """Open the cache and read."""
        before, began = own_memory(), time.monotonic()
        rank, world = (0, 1) if self.alone else (place.number, place.count)
        with CacheReader(self.cache, self.columns, check_crc=self.check_crc, direct=self.direct) as reader:
            count = len(reader.valid_rows)
            steps = count // (world * BATCH_SIZE)
            loader = CacheLoader(
                reader,
                rows=reader.valid_rows,
                batch_size=world * BATCH_SIZE,
                rank=rank,
                world=world,
                seed=place.number if self.alone else 0,
                threads=self.threads,
                columns_at=lambda step: self.columns,
                # warm, it goes on reading ahead: else the last batches would be there, and none begun
                last_image=None if self.warm else count,
            )
            opening = time.monotonic() - began
            batches = iter(loader)
            for _ in range(steps if self.warm else 0):
                next(batches)
            seen = 0
            with Stopwatch(place) as watch:
                for batch in islice(batches, steps * (EPOCHS if self.warm else 1)):
                    seen += len(batch.rows)
                    place.meeting.wait()
            share = watch.share(
                seen, opening=opening, memory=own_memory() - before, open_files=open_descriptors()
            )
            loader.close()
        return share
