"""The loader against a plain copy of the same bytes and, cold, against plain sequential reads of the disk."""

from __future__ import annotations

import mmap
import os
import shutil
import time
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...data.format.layout import shard_file
from ...data.format.opening import open_manifest
from ...data.reading.loader import CacheLoader
from ...data.reading.order import permutation
from ...data.reading.reader import CacheReader
from ...data.testing import synthetic_cache
from .forms import FORMS
from .measured import Measured, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ...data.format.columns import ColumnSpec
    from .measured import BenchSettings

BATCH_SIZE = 64
# few: a batch of a large image set, too, is of as many shards as it has rows
SHARD_ROWS = 32
THREADS = (1, 2, 4)

# readers that take milliseconds a row are measured on so many
_FEW = BATCH_SIZE
_BLOCK = 4 << 20


class Pass(NamedTuple):
    """One measurement, as rows read and the seconds and CPU seconds they took."""

    rows: int
    seconds: float
    cpu: float


def bench_loader(settings: BenchSettings, room: Path) -> Iterator[tuple[str, str, list[Measured]]]:
    """Measure random rows per second of 256² latents and DINOv2-B tokens in batches of 64.

    There is a table for each form and state.

    Warm, the limit is one thread copying whole rows, latents and tokens together, from a memory map into one
    reused batch buffer; cold, one thread reading the shards in sequence past the page cache.
    """
    rows = max(settings.rows, BATCH_SIZE) // BATCH_SIZE * BATCH_SIZE
    for form, columns in FORMS.items():
        bench = LoaderBench(room / form, columns, rows)
        what = f"{form}, {rows:,} rows of {bench.row_bytes:,} bytes, batch {BATCH_SIZE}"
        yield f"loader: {what}, page cache warm", "rows/s", bench.lines(bench.warm(), settings.rounds)
        state = "cold" if bench.can_drop() else "NOT cold, it cannot be emptied here"
        yield f"loader: {what}, page cache {state}", "rows/s", bench.lines(bench.cold(), settings.rounds)
        shutil.rmtree(room / form)


class LoaderBench:
    """A cache, the same rows in a plain file, and what is measured with them.

    Attributes:
        cache: its folder.
        columns: of the cache, name → spec.
        row_bytes: of all columns.
        shards: files of the cache's rows.
        plain: the rows again, in one file of uint8 ``[rows, row_bytes]``.
    """

    def __init__(
        self,
        room: Path,
        columns: Mapping[str, ColumnSpec],
        rows: int,
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.row_bytes = sum(spec.row_bytes for spec in columns.values())
        self.columns = columns
        self.cache = room / "cache"
        manifest = synthetic_cache(
            self.cache, num_rows=rows, columns=columns, shard_rows=SHARD_ROWS, notes=notes or {}
        )
        self.shards = [
            shard_file(self.cache, column, spec, shard)
            for column, spec in columns.items()
            for shard in range(manifest.num_shards)
        ]
        self.plain = room / "rows.npy"
        plain = np.lib.format.open_memmap(self.plain, mode="w+", dtype=np.uint8, shape=(rows, self.row_bytes))
        # written for real: pages of a hole in a sparse file would all be one page in memory
        for start in range(0, rows, BATCH_SIZE):
            plain[start : start + BATCH_SIZE] = np.arange(self.row_bytes, dtype=np.uint8)
        plain.flush()

    def lines(self, variants: Mapping[str, Callable[[], Pass]], rounds: int) -> list[Measured]:
        """Measure every variant in turn."""
        cpu: dict[str, list[float]] = {name: [] for name in variants}

        def rate(name: str) -> float:
            found = variants[name]()
            cpu[name].append(1000 * found.cpu / found.rows)
            return found.rows / found.seconds

        rates = interleaved({name: partial(rate, name) for name in variants}, rounds)
        return [
            Measured(
                name=name,
                rates=values,
                bytes_per_item=self.row_bytes,
                cpu_per_1000=tuple(cpu[name][-rounds:]),
            )
            for name, values in rates.items()
        ]

    def warm(self) -> dict[str, Callable[[], Pass]]:
        """Measure what is read out of the page cache."""
        variants: dict[str, Callable[[], Pass]] = {"copy from a memory map (limit)": self.copy}
        for threads in THREADS:
            for check_crc in (False, True):
                name = f"repa, {thread_count(threads)}, crc32c {'on' if check_crc else 'off'}"
                variants[name] = partial(self.load, threads, "off", check_crc=check_crc, warm_up=True)
        return {**variants, **self._others()}

    def cold(self) -> dict[str, Callable[[], Pass]]:
        """Measure what is read from the disk."""
        variants: dict[str, Callable[[], Pass]] = {"sequential O_DIRECT reads (limit)": self._sequential}
        for threads in THREADS:
            for direct in ("on", "off"):
                way = "O_DIRECT" if direct == "on" else "page cache"
                variants[f"repa, {thread_count(threads)}, {way}"] = partial(self.load, threads, direct)
        variants = {**variants, "copy from a memory map": self.copy, **self._others()}
        return {name: partial(self._dropped, action) for name, action in variants.items()}

    def can_drop(self) -> bool:
        """Tell whether the page cache lets go of the shards when told to.

        A byte of each is looked for in it.
        """
        self.drop()
        buffer = bytearray(1)
        for path in self.shards:
            with open(path, "rb", buffering=0) as file:
                try:
                    # one byte only, as asking for it makes the kernel fetch what follows
                    os.preadv(file.fileno(), [buffer], path.stat().st_size // 2, os.RWF_NOWAIT)
                except BlockingIOError:
                    continue
                except OSError:
                    return False
                return False
        return True

    def _dropped(self, action: Callable[[], Pass]) -> Pass:
        self.drop()
        return action()

    def drop(self) -> None:
        """Have the page cache let go of all files, as far as it does."""
        for path in (*self.shards, self.plain):
            with open(path, "rb", buffering=0) as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def copy(self) -> Pass:
        """Copy rows from a memory map into one reused batch buffer."""
        plain = np.load(self.plain, mmap_mode="r")
        order = permutation(0, 0, len(plain))
        buffer = np.ones((BATCH_SIZE, self.row_bytes), dtype=np.uint8)
        with Timer() as timer:
            for start in range(0, len(order), BATCH_SIZE):
                for position, row in enumerate(order[start : start + BATCH_SIZE]):
                    buffer[position] = plain[row]
        return timer.result(len(order))

    def _sequential(self) -> Pass:
        with Timer() as timer:
            total = sum(map(read_whole, self.shards))
        return timer.result(total // self.row_bytes)

    def load(self, threads: int, direct: str, *, check_crc: bool = True, warm_up: bool = False) -> Pass:
        """Read an epoch of batches, after one that does not count if the page cache is to be warm."""
        columns = tuple(self.columns)
        with CacheReader(self.cache, columns, check_crc=check_crc, direct=direct) as reader:
            count = len(reader.valid_rows)
            loader = CacheLoader(
                reader,
                rows=reader.valid_rows,
                batch_size=BATCH_SIZE,
                threads=threads,
                columns_at=lambda step: columns,
                # warm, it goes on reading ahead: else the last batches would be there, and none begun
                last_image=None if warm_up else count,
            )
            batches = iter(loader)
            # warm: an epoch to open shards and settle buffers, as in a long run; then one that counts
            for _ in range(count // BATCH_SIZE if warm_up else 0):
                next(batches)
            with Timer() as timer:
                seen = sum(len(batch.rows) for batch in islice(batches, count // BATCH_SIZE))
            loader.close()
        return timer.result(seen)

    def _others(self) -> dict[str, Callable[[], Pass]]:
        """Other readers of the same cache, those that are installed."""
        found: dict[str, Callable[[], Pass]] = {}
        if find_spec("tensorstore") is not None:
            found["tensorstore, batches into given buffers"] = self._tensorstore
        found["zarr-python, row by row"] = self._zarr
        return found

    def _rows(self, limit: int | None = None) -> NDArray[np.int64]:
        count = open_manifest(self.cache).num_rows
        return permutation(1, 0, count)[: min(count, limit or count)]

    def _buffers(self) -> dict[str, NDArray[Any]]:
        return {
            column: np.ones((BATCH_SIZE, *spec.shape), dtype=spec.numpy_dtype)
            for column, spec in self.columns.items()
        }

    def _tensorstore(self) -> Pass:
        import tensorstore

        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
        stores = {
            column: tensorstore.open(
                {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self.cache / column}/"}},
                context=context,
            ).result()
            for column in self.columns
        }
        order, buffers = self._rows(), self._buffers()
        targets = {column: tensorstore.array(buffer, copy=False) for column, buffer in buffers.items()}
        with Timer() as timer:
            for rows in np.split(order, len(order) // BATCH_SIZE):
                pending = [
                    targets[column].write(store[tensorstore.d[0][rows.tolist()]][:, 0])
                    for column, store in stores.items()
                ]
                for each in pending:
                    each.result()
        return timer.result(len(order))

    def _zarr(self) -> Pass:
        import zarr

        group: Any = zarr.open_group(self.cache, mode="r")
        arrays = {column: group[column] for column in self.columns}
        order, buffers = self._rows(_FEW), self._buffers()
        with Timer() as timer:
            for position, row in enumerate(order.tolist()):
                for column, array in arrays.items():
                    buffers[column][position % BATCH_SIZE] = array[row, 0]
        return timer.result(len(order))


class Timer:
    """Seconds and CPU seconds of all threads of this process, of what runs in the context."""

    def __enter__(self) -> Timer:
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        started, cpu = self._started
        self._seconds, self._cpu = time.perf_counter() - started, time.process_time() - cpu

    def result(self, rows: int) -> Pass:
        """Return what was measured, of so many rows."""
        return Pass(rows, self._seconds, self._cpu)


def thread_count(count: int) -> str:
    """Write a number of threads, in the singular where it is one."""
    return f"{count} thread{'s' * (count > 1)}"


def read_whole(path: Path) -> int:
    """Read a file in sequence past the page cache, to nowhere, and return its bytes."""
    memory = mmap.mmap(-1, _BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        offset = 0
        while more := os.preadv(descriptor, [memory], offset):
            offset += more
    finally:
        os.close(descriptor)
    return offset
