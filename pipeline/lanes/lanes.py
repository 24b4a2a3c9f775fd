"""Lanes compute batches ahead of whoever waits for them, with bytes that do not depend on cores.

On a CPU a batch is computed by *one* thread, several batches at a time, because PyTorch's own intra-op
threads change the last bits. Measured with torch 2.15 on an AVX-512 CPU: 1×1 convolutions (oneDNN) differ
between 1 and 2 threads, SiLU between 2 and 3 (vector body and scalar tail where the threads' pieces meet);
a cache would depend on the number of cores and of processes.

On a GPU kernels and copies are queued some batches ahead; time is measured there, by events.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...data.errors import RepaError
from ...data.units import counted
from .encoded import EncodedBatch, Pending, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .batches import Batch


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one network computes of a batch, whatever number of sources it is for.

    Attributes:
        model: name of the network, by which its time is booked.
        sources: sources that its outputs are columns of.
        compute: uint8 images ``[B, 3, R, R]`` → column → ``[B, …]``, on the same device.
    """

    model: str
    sources: tuple[str, ...]
    compute: Callable[[torch.Tensor], dict[str, torch.Tensor]]


class Lanes(Protocol):
    """Computes batches ahead of whoever waits for them.

    Attributes:
        count: batches that are computed at the same time.
        ahead: batches worth submitting before the first result is asked for: enough to keep the device busy
            while a shard is committed.
    """

    count: int
    ahead: int

    def submit(self, batch: Batch, tasks: Sequence[Task]) -> Pending:
        """Start on a batch.

        Raises:
            RepaError: the device has too little memory for it.
        """
        ...


def _stack(batch: Batch) -> torch.Tensor:
    return torch.stack([torch.from_numpy(image) for image in batch.images])


def _encoded(batch: Batch, tasks: Sequence[Task], host: Mapping[str, torch.Tensor]) -> EncodedBatch:
    return EncodedBatch(
        shard=batch.shard,
        sources=tuple(source for task in tasks for source in task.sources),
        rows=batch.rows,
        invalid=batch.invalid,
        columns={name: values.numpy() for name, values in host.items() if not name.endswith(_FINITE)},
        finite={
            name.removesuffix(_FINITE): values.numpy()
            for name, values in host.items()
            if name.endswith(_FINITE)
        },
        last=batch.last,
    )


# beside each column travels one bool per row, under the column's name with this suffix
_FINITE = ":finite"


def _with_finite(columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the columns, and for each, bool ``[B]``, whether the row is finite in the storage dtype."""
    finite = {f"{name}{_FINITE}": values.isfinite().flatten(1).all(dim=1) for name, values in columns.items()}
    return {**columns, **finite}


class _CpuLanes:
    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self.count = count
        # one for each lane, and a few that wait for a lane
        self.ahead = count + 4
        self._pool = pool

    def submit(self, batch: Batch, tasks: Sequence[Task]) -> Pending:
        return _CpuPending(self._pool.submit(self._compute, batch, tasks))

    @staticmethod
    def _compute(batch: Batch, tasks: Sequence[Task]) -> Result:
        host: dict[str, torch.Tensor] = {}
        seconds = {}
        if batch.rows:
            images = _stack(batch)
            for task in tasks:
                started = time.perf_counter()
                with torch.inference_mode():
                    host.update(_with_finite(task.compute(images)))
                seconds[task.model] = time.perf_counter() - started
        return Result(_encoded(batch, tasks, host), seconds)


@dataclass(frozen=True)
class _CpuPending:
    future: Future[Result]

    def ready(self, timeout: float) -> bool:
        return bool(wait([self.future], timeout).done)

    def result(self) -> Result:
        return self.future.result()


class _CudaLane:
    count = 1
    ahead = 16

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def submit(self, batch: Batch, tasks: Sequence[Task]) -> Pending:
        try:
            return self._launch(batch, tasks)
        except torch.OutOfMemoryError as error:
            raise RepaError(
                f"{self._device} has too little memory for a batch of {counted(len(batch.rows), 'image')}",
                "give a smaller --batch-size",
                field="--batch-size",
            ) from error

    def _launch(self, batch: Batch, tasks: Sequence[Task]) -> Pending:
        host: dict[str, torch.Tensor] = {}
        marks = [_mark()]
        if batch.rows:
            # from pinned memory the copy is only queued; from other memory this thread would wait for it
            images = _stack(batch).pin_memory().to(self._device, non_blocking=True)
            # begun anew: copying the images is no network's time
            marks = [_mark()]
            for task in tasks:
                with torch.inference_mode():
                    outputs = _with_finite(task.compute(images))
                for name, values in outputs.items():
                    # pinned blocks come from PyTorch's cache and are used again, batch after batch
                    host[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                    host[name].copy_(values, non_blocking=True)
                marks.append(_mark())
        return _CudaPending(batch, tasks, host, marks)


def _mark() -> Any:
    """Record an event that notes the device's time when it comes to here."""
    make: Any = torch.cuda.Event
    event = make(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class _CudaPending:
    batch: Batch
    tasks: Sequence[Task]
    host: Mapping[str, torch.Tensor]
    marks: Sequence[Any]

    def ready(self, timeout: float) -> bool:
        return True  # a batch takes a GPU no longer than anyone would wait

    def result(self) -> Result:
        # until the last copy is done what is in host memory is not yet the result
        self.marks[-1].synchronize()
        seconds = {
            task.model: before.elapsed_time(after) / 1000
            for task, before, after in zip(self.tasks, self.marks, self.marks[1:], strict=False)
        }
        return Result(_encoded(self.batch, self.tasks, self.host), seconds)


@contextmanager
def open_lanes(device: str, threads: int) -> Iterator[Lanes]:
    """Open the lanes of a device.

    Args:
        device: ``cpu`` or ``cuda:<index>``.
        threads: CPU only: threads, each computing one batch at a time.
    """
    if device != "cpu":
        torch.cuda.set_device(device)
        yield _CudaLane(torch.device(device))
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # OpenMP keeps the number of threads per calling thread, so each lane sets it for itself
    pool = ThreadPoolExecutor(threads, "repa-lane", initializer=torch.set_num_threads, initargs=(1,))
    patient = True
    try:
        yield _CpuLanes(pool, threads)
    except KeyboardInterrupt:
        # who pressed Ctrl-C does not wait for the batches under way: the command ends the process
        patient = False
        raise
    finally:
        pool.shutdown(wait=patient, cancel_futures=True)
        torch.set_num_threads(before)
