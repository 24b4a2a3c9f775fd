"""Writing a cache against a plain sequential write of the same bytes, until they are on the disk."""

from __future__ import annotations

import os
import shutil
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.testing import synthetic_cache
from ...data.units import counted
from ...data.writing.writer import SourceWriter
from .forms import FORMS
from .measured import Measured, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ...data.format.columns import ColumnSpec
    from ...data.format.manifest import Manifest
    from .measured import BenchSettings

SHARD_ROWS = 1024


def bench_writer(settings: BenchSettings, room: Path) -> Iterator[tuple[str, str, list[Measured]]]:
    """Measure rows per second of 256² latents and DINOv2-B tokens onto the disk by one thread.

    There is a table for each form.

    The limit writes row after row into one file and synchronises it once; a cache is shards of 1,024 rows,
    each with its checksums, synchronised, renamed and recorded before the next begins.
    """
    for form, columns in FORMS.items():
        bench = _Bench(room / form, columns, settings.rows)
        variants: dict[str, Callable[[], None]] = {
            "sequential write, one fsync (limit)": bench.plain,
            "repa, committed shards": bench.repa,
            "zarr-python, a shard at a time, one sync": bench.zarr,
        }
        rates = interleaved(
            {name: partial(bench.on_disk, each) for name, each in variants.items()}, settings.rounds
        )
        rows, each = counted(bench.count, "row", ","), counted(bench.row_bytes, "byte", ",")
        what = f"{form}, {rows} of {each}, {bench.shard_rows:,} a shard"
        yield (
            f"writer: {what}",
            "rows/s",
            [
                Measured(name=name, rates=values, bytes_per_item=bench.row_bytes)
                for name, values in rates.items()
            ],
        )
        shutil.rmtree(room / form)


class _Bench:
    """One row of values that do not compress, and ways to write it again and again."""

    def __init__(self, room: Path, columns: Mapping[str, ColumnSpec], rows: int) -> None:
        self.shard_rows = min(SHARD_ROWS, rows)
        self.count = rows // self.shard_rows * self.shard_rows
        self.row_bytes = sum(spec.row_bytes for spec in columns.values())
        self._room = room
        self._columns = columns
        generator = np.random.default_rng(0)
        self._row: dict[str, NDArray[Any]] = {
            column: np.frombuffer(generator.bytes(spec.row_bytes), dtype=spec.numpy_dtype).reshape(
                1, *spec.shape
            )
            for column, spec in columns.items()
        }

    def on_disk(self, write: Callable[[], None]) -> float:
        """Measure rows per second of writing into an empty folder, the disk being idle before."""
        shutil.rmtree(self._room, ignore_errors=True)
        self._room.mkdir()
        os.sync()
        started = time.perf_counter()
        write()
        return self.count / (time.perf_counter() - started)

    def plain(self) -> None:
        """Write all rows into one file."""
        parts = [array.reshape(-1).view(np.uint8).data for array in self._row.values()]
        with open(self._room / "rows.bin", "wb", buffering=0) as file:
            for _ in range(self.count):
                os.writev(file.fileno(), parts)
            os.fsync(file.fileno())

    def repa(self) -> None:
        """Write a cache, source after source."""
        cache, manifest = self._declared()
        for source in manifest.sources:
            columns = list(manifest.source_columns(source))
            with SourceWriter(cache, manifest, source, range(manifest.num_shards)) as writer:
                for number in writer.remaining:
                    with writer.shard(number) as shard:
                        for row in shard.rows:
                            for column in columns:
                                shard.write(row, column, self._row[column])
                        shard.commit()

    def zarr(self) -> None:
        """Write the same arrays with zarr-python, given whole shards, which is where it is fastest."""
        import zarr

        group: Any = zarr.open_group(self._declared()[0], mode="r+")
        for column in self._columns:
            block = np.broadcast_to(self._row[column], (self.shard_rows, *self._row[column].shape))
            for start in range(0, self.count, self.shard_rows):
                group[column][start : start + self.shard_rows] = block
        os.sync()

    def _declared(self) -> tuple[Path, Manifest]:
        """Make a cache without rows."""
        cache = self._room / "cache"
        return cache, synthetic_cache(
            cache, num_rows=self.count, columns=self._columns, shard_rows=self.shard_rows, written=False
        )
