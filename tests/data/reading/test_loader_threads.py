"""Memory that batches lie in, errors that reach the training loop, and how reading ends."""

from __future__ import annotations

import gc
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.data.errors import CacheError, CorruptRowError
from repa.data.format.layout import shard_file
from repa.data.reading.loader import Batch, PinnedMemory, RecycledMemory
from repa.data.reading.reader import CacheReader
from repa.data.testing import expected_row
from small_loader import COLUMNS, MOMENTS, PATCH, check, global_batch, loader_threads, make

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytestmark = pytest.mark.usefixtures("no_loader_thread_is_left")


def test_kept_batches_never_change(small_reader: CacheReader) -> None:
    kept = []
    for batch in make(small_reader, prefetch=3, last_image=24 * 40):
        # every third is dropped, so that memory is used again while the others are kept
        if batch.step % 3:
            kept.append(batch)
    assert len({batch.columns[PATCH].data_ptr() for batch in kept}) == len(kept)
    for batch in kept:
        check(batch)


def test_whatever_shares_the_storage_keeps_it(small_reader: CacheReader) -> None:
    weight = torch.ones((), requires_grad=True)
    slices, arrays, graphs, expected = [], [], [], []
    for batch in make(small_reader, last_image=24 * 12):
        moments = batch.columns[MOMENTS]
        slices.append(moments[3:5, 0])
        arrays.append(batch.columns[PATCH].numpy()[1:])
        graphs.append((moments * weight).sum())
        expected.append(
            np.stack([expected_row(MOMENTS, row, COLUMNS[MOMENTS]) for row in batch.rows.tolist()]).astype(
                np.float64
            )
        )
        rows = batch.rows.tolist()
        assert np.array_equal(arrays[-1][0], expected_row(PATCH, rows[1], COLUMNS[PATCH]))
    # only what autograd saved for the backward pass keeps each batch of moments whole
    for part, array, graph, values in zip(slices, arrays, graphs, expected, strict=True):
        assert np.array_equal(part.numpy(), values[3:5, 0].astype(np.float32))
        assert len(array) == 23
        weight.grad = None
        graph.backward()
        assert weight.grad is not None
        assert abs(weight.grad.item() - values.sum()) < 1e-3 * np.abs(values).sum() / 100


def test_memory_of_batches_let_go_is_used_again(small_reader: CacheReader) -> None:
    loader = make(small_reader, prefetch=2, last_image=24 * 30)
    for batch in loader:
        check(batch)
    assert isinstance(loader._memory, RecycledMemory)
    # per column: two being read, one handed out, one still bound by the loop; and a thread may not yet have
    # let go of what it has read
    assert loader._memory.allocated <= 2 * (4 + loader.threads)


def test_memory_comes_back_when_the_last_tensor_dies() -> None:
    memory = RecycledMemory(keep=2)
    spec = COLUMNS[PATCH]
    array, tensor = memory.take(PATCH, 3, spec)
    place = tensor.data_ptr()
    array[:] = 1
    view = tensor[1].numpy()
    del array, tensor
    assert memory.take(PATCH, 3, spec)[1].data_ptr() != place
    assert memory.allocated == 2
    assert (view == 1).all()
    del view
    assert place in {memory.take(PATCH, 3, spec)[1].data_ptr() for _ in range(2)}
    # no more than asked for is kept, and nothing of columns that are no longer read
    taken = [memory.take(PATCH, 3, spec) for _ in range(5)]
    del taken
    assert len(memory._free[PATCH]) == 2
    memory.keep_only([MOMENTS])
    assert PATCH not in memory._free


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_survive_asynchronous_copies(small_reader: CacheReader) -> None:
    loader = make(small_reader, pin_memory=True, last_image=24 * 40)
    assert isinstance(loader._memory, PinnedMemory)
    copies = []
    for batch in loader:
        assert batch.columns[PATCH].is_pinned()
        moved = {column: values.to("cuda", non_blocking=True) for column, values in batch.columns.items()}
        copies.append((batch.rows, batch.label, moved))
    torch.cuda.synchronize()
    for rows, label, moved in copies:
        columns = {column: values.cpu() for column, values in moved.items()}
        check(
            Batch(
                step=0,
                micro=0,
                images_seen=0,
                rows=rows,
                views=torch.zeros_like(rows),
                label=label,
                columns=columns,
            )
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a CUDA device")
def test_pinning_is_ignored_without_cuda(small_reader: CacheReader) -> None:
    loader = make(small_reader, pin_memory=True)
    assert isinstance(loader._memory, RecycledMemory)


@pytest.mark.parametrize("threads", [1, 3])
def test_corrupt_byte_reaches_the_training_loop(small_cache: Path, tmp_path: Path, threads: int) -> None:
    copy = Path(shutil.copytree(small_cache, tmp_path / "cache"))
    path = shard_file(copy, PATCH, COLUMNS[PATCH], 2)
    data = bytearray(path.read_bytes())
    data[3 * (COLUMNS[PATCH].row_bytes + 4) + 50] ^= 1
    path.write_bytes(data)
    seen: list[int] = []
    with CacheReader(copy, list(COLUMNS)) as reader:
        loader = make(reader, batch_size=6, threads=threads)
        with pytest.raises(CorruptRowError) as caught:
            seen.extend(row for batch in loader for row in batch.rows.tolist())
        assert (caught.value.row, caught.value.column, caught.value.path) == (19, PATCH, str(path))
        # every batch before the bad one was handed out, and nothing of the bad one
        assert 19 not in seen
        assert 19 in global_batch(reader, len(seen), 6)
        assert loader.images_seen == len(seen)
        assert loader_threads() == []
        # without the column the run can go on
        loader.columns_at = lambda step: [MOMENTS]
        assert next(iter(loader)).rows.tolist() == global_batch(reader, len(seen), 6)


def test_error_of_the_operating_system_keeps_its_cause(small_cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_cache, tmp_path / "cache"))
    with CacheReader(copy, list(COLUMNS)) as reader:
        shutil.rmtree(copy / "demo" / "patch" / "c")
        with pytest.raises(CacheError, match="demo/patch cannot be read") as caught:
            next(iter(make(reader)))
        assert isinstance(caught.value.__cause__, FileNotFoundError)


def leave_by_break(stream: Iterator[Batch]) -> None:
    next(stream)


def leave_by_interrupt(stream: Iterator[Batch]) -> None:
    next(stream)
    raise KeyboardInterrupt


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_interrupt])
def test_dropping_the_iterator_ends_its_threads(
    small_reader: CacheReader, leave: Callable[[Iterator[Batch]], None]
) -> None:
    loader = make(small_reader)
    try:
        leave(iter(loader))
    except KeyboardInterrupt as interrupt:
        # the traceback holds the frames, and they the iterator
        interrupt.with_traceback(None)
    assert loader_threads() == []
    stream = iter(loader)
    next(stream)
    assert 0 < len(loader_threads()) <= 2
    loader.close()
    assert loader_threads() == []
    with pytest.raises(StopIteration):
        next(stream)


def test_garbage_cycle_ends_its_threads(small_reader: CacheReader) -> None:
    cycle: list[Any] = [make(small_reader)]
    cycle.append(iter(cycle[0]))
    cycle.append(cycle)
    next(cycle[1])
    del cycle
    gc.collect()
    for thread in loader_threads():  # one of them may have been the collector, which cannot wait for itself
        thread.join()


INTERRUPTED = """
import sys, time
from repa.data.reading.loader import CacheLoader
from repa.data.reading.reader import CacheReader
reader = CacheReader(sys.argv[1], ["sd-vae/moments", "demo/patch"])
loader = CacheLoader(reader, rows=reader.valid_rows, batch_size=8, columns_at=lambda step: reader.columns)
stream = iter(loader)
next(stream)
print("reading", flush=True)
for batch in stream:
    time.sleep(0.01)
"""


def test_control_c_ends_the_process(small_cache: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(small_cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        try:
            for _ in range(10):
                process.send_signal(signal.SIGINT)
                # Python drops it where nothing can be raised, in a finaliser: then a user presses it again
                with suppress(subprocess.TimeoutExpired):
                    _, errors = process.communicate(timeout=60)
                    break
        finally:
            process.kill()
    assert "KeyboardInterrupt" in errors
    assert process.returncode in (-signal.SIGINT, 130)
