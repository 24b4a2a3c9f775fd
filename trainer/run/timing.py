"""The cost of a run in time, bytes and memory, a row in ``timing.csv`` for each logged stretch.

It is a file of its own: ``metrics.csv`` of a run that was killed and resumed is byte for byte that of an
undisturbed one, and what the killed steps cost was spent all the same.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING

import torch

from .metrics import MetricsFile, read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TIMING_FILE = "timing.csv"
_NEVER = 10**18  # no step is later: rows of steps that are made again stay


class Timing:
    """What steps cost, from the start of training or the row before.

    Columns are ``step``, ``images_per_second`` of training alone, ``seconds`` on the wall with previews,
    evaluations and checkpoints, ``devices``, ``bytes_read`` from the cache by all of them (the loader reads
    ahead), and ``peak_memory`` of rank 0 so far, in bytes.

    Args:
        run: folder of the run.
        device: that trains.
        devices: how many do.
        bytes_read: bytes that this process has read from the cache so far; None where nobody counts them.
        sum_over_ranks: a value's sum over the ranks.
    """

    def __init__(
        self,
        run: Path,
        device: torch.device,
        devices: int,
        bytes_read: Callable[[], int] | None,
        sum_over_ranks: Callable[[float], float],
    ) -> None:
        self._path = run / TIMING_FILE
        self._device = device
        self._devices = devices
        self._bytes_read = bytes_read
        self._sum = sum_over_ranks
        self._file: MetricsFile | None = None
        self._read = 0 if bytes_read is None else bytes_read()
        self._since = time.perf_counter()

    def open(self) -> None:
        """Open the file, with the rows of earlier starts.

        Raises:
            RepaError: it is damaged, or the disk refuses.
        """
        self._file = MetricsFile(self._path, resumed_step=_NEVER)

    def values(self, images_per_second: float) -> dict[str, float]:
        """Measure the stretch that ends here. Every rank must call it."""
        now = time.perf_counter()
        values = {
            "images_per_second": images_per_second,
            "seconds": now - self._since,
            "devices": float(self._devices),
        }
        self._since = now
        if self._bytes_read is not None:
            read = self._bytes_read()
            values["bytes_read"] = self._sum(float(read - self._read))
            self._read = read
        values["peak_memory"] = float(peak_memory(self._device))
        return values

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a row where the file is open.

        Raises:
            RepaError: the disk refuses.
        """
        if self._file is not None:
            self._file.write(step, values)


def device_hours(run: Path, step: int) -> float | None:
    """Return the time that devices had trained by a step, summed over them, with steps that were made again.

    It is None where a part of it was not measured.

    Args:
        run: folder of the run.
        step: the last one that counts.

    Raises:
        RepaError: the file is damaged.
    """
    file = run / TIMING_FILE
    rows = read_metrics(file) if file.exists() else []
    rows = [row for row in rows if row["step"] <= step]
    if not rows or not all({"seconds", "devices"} <= row.keys() for row in rows):
        return None
    return sum(row["seconds"] * row["devices"] for row in rows) / 3600


def peak_memory(device: torch.device) -> int:
    """Return the most bytes so far, of the allocator on a CUDA device and else of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts kB
