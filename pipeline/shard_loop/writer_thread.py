"""The writer thread, which puts computed batches on disk while the device computes the next ones.

One thread, one bounded queue of batches under way, in row order. The thread waits for each, opens the shards,
writes, commits, and is the only one to touch the store; its first error stops it, frees the producer, and is
raised in the producer.
"""

from __future__ import annotations

import queue
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import RepaError
from ...data.format.columns import source_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from ...data.format.manifest import Manifest
    from ...data.writing.writer import ShardWriter, SourceWriter
    from ..lanes.encoded import EncodedBatch, Pending

_POLL_SECONDS = 0.1


@dataclass(kw_only=True)
class Written:
    """What reached the disk, committed shards only.

    Attributes:
        rows: source → rows committed, the invalid ones not counted.
        bytes: column → bytes committed, checksums and indexes not counted.
        invalid: row → reason, over all sources.
        busy_seconds: model → time the device was busy with it.
        write_seconds: time the thread wrote, beside the device's.
    """

    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    invalid: dict[int, str] = field(default_factory=dict)
    busy_seconds: dict[str, float] = field(default_factory=dict)
    write_seconds: float = 0.0


class WriterThread:
    """Writes batches in the order they are put, in its own thread.

    Args:
        writers: source → its writer, already holding the locks of its shards.
        manifest: of the cache, with every source that is written.
        keys: row → image key, for the errors.
        depth: batches that may wait; `put` blocks beyond.
        on_batch: called in the thread after each batch with its sources and the number of rows it brought,
            invalid ones included.
        check: called while waiting in `put` or for the end; may raise.
        noun: what a row is, for the errors.
    """

    def __init__(
        self,
        writers: Mapping[str, SourceWriter],
        manifest: Manifest,
        keys: Sequence[str],
        *,
        depth: int = 4,
        on_batch: Callable[[tuple[str, ...], int], None] | None = None,
        check: Callable[[], None] = lambda: None,
        noun: str = "image",
    ) -> None:
        self.written = Written()
        self._writers = writers
        self._manifest = manifest
        self._keys = keys
        self._on_batch = on_batch
        self._check = check
        self._noun = noun
        self._queue: queue.Queue[Pending | None] = queue.Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="repa-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for what was put. After an error in the block it is dropped with the shard in flight."""
        try:
            if kind is None:
                self._enqueue(None)
                while self._thread.is_alive():
                    self._check()
                    self._thread.join(_POLL_SECONDS)
        finally:
            self._ended.set()
            self._thread.join()
        if kind is None:
            self._raise_error()

    def put(self, batch: Pending) -> None:
        """Hand a batch over. It waits while the queue is full.

        Raises:
            RepaError: the thread has stopped, for this reason.
        """
        self._enqueue(batch)

    def _enqueue(self, item: Pending | None) -> None:
        # waiting in short pieces, so that an error of the thread or an interrupt is noticed meanwhile
        while True:
            self._raise_error()
            self._check()
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def _raise_error(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, RepaError):
            raise self._error
        raise RuntimeError("the writer thread stopped") from self._error

    def _next(self) -> EncodedBatch | None:
        """Take the next batch.

        It is None, again and again, once there are no more or they are to be dropped.
        """
        while not self._ended.is_set():
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if item is None:
                self._ended.set()
                return None
            # in short pieces too: a batch may be dropped before it is computed
            while not item.ready(_POLL_SECONDS):
                if self._ended.is_set():
                    return None
            result = item.result()
            busy = self.written.busy_seconds
            for model, seconds in result.seconds.items():
                busy[model] = busy.get(model, 0.0) + seconds
            return result.batch
        return None

    def _run(self) -> None:
        try:
            # the first batch of a shard opens it, the last commits it
            while (batch := self._next()) is not None:
                self._write_shard(batch)
        except BaseException as error:
            self._error = error

    def _write_shard(self, first: EncodedBatch) -> None:
        """Write a shard's batches, from its first to its last, and commit.

        Without the last, it is abandoned.
        """
        invalid: dict[int, str] = {}
        rows = 0
        with ExitStack() as stack:
            shards = {
                source: stack.enter_context(self._writers[source].shard(first.shard))
                for source in first.sources
            }
            batch: EncodedBatch | None = first
            while batch is not None:
                started = time.perf_counter()
                self._write_batch(shards, batch)
                invalid.update(batch.invalid)
                rows += len(batch.rows)
                if batch.last:
                    for shard in shards.values():
                        shard.commit()
                self.written.write_seconds += time.perf_counter() - started
                if self._on_batch is not None:
                    self._on_batch(batch.sources, len(batch.rows) + len(batch.invalid))
                if batch.last:
                    break
                batch = self._next()
            else:
                return
        self._account(batch, rows, invalid)

    def _write_batch(self, shards: Mapping[str, ShardWriter], batch: EncodedBatch) -> None:
        for row, reason in batch.invalid.items():
            for shard in shards.values():
                shard.mark_invalid(row, reason)
        for column, values in batch.columns.items():
            if not batch.finite[column].all():
                position = int(np.argmin(batch.finite[column]))
                self._refuse(column, batch.rows[position], values[position])
            shard = shards[source_of(column)]
            for row, value in zip(batch.rows, values, strict=True):
                shard.write(row, column, value)

    def _refuse(self, column: str, row: int, value: NDArray[np.generic]) -> None:
        if value.dtype == np.float16 and not np.isnan(value).any():
            what, remedy = "a value beyond float16's largest, 65504", "store it with --feature-dtype float32"
        else:
            what, remedy = "a value that is not finite", "try --compute-dtype float32, and check the weights"
        raise RepaError(
            f"{column} of {self._noun} {self._keys[row]} (row {row}) has {what}; "
            f"nothing of its shard is kept, the shards before it are",
            f"{remedy}",
        )

    def _account(self, batch: EncodedBatch, rows: int, invalid: Mapping[int, str]) -> None:
        written = self.written
        written.invalid.update(invalid)
        for source in batch.sources:
            written.rows[source] = written.rows.get(source, 0) + rows
            for column, spec in self._manifest.source_columns(source).items():
                added = rows * len(self._manifest.views) * spec.row_bytes
                written.bytes[column] = written.bytes.get(column, 0) + added
