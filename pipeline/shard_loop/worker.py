"""The shard loop, which writes one device's share of a cache.

Decoding (worker processes), computing (lanes) and writing (a thread) overlap: this loop only hands batches
on, so the device waits for nobody. It needs no word from the other processes.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.writing.store import ensure_cache, ensure_source
from ...data.writing.writer import SourceWriter
from ..lanes.batches import batches
from ..plan import present_manifest, require_room_for
from ..source_plan import missing_shards
from .interrupts import deferred_interrupts
from .writer_thread import WriterThread, Written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from ...data.format.manifest import Manifest
    from ..columns.calibrator import Calibrator
    from ..columns.models import SourceModel
    from ..config import PreprocessConfig
    from ..images.base import ImageSource
    from ..lanes.batches import Decoded
    from ..lanes.lanes import Lanes, Task

    Report = Callable[[Mapping[str, int], int], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does.

    Attributes:
        config: the command, resolved.
        manifest: of the cache, the sources left out; what `ensure_cache` is asked for.
        share: shards of the whole job.
        rank: this process, of ``world``: it owns the shards of the job at positions rank, rank + world, …
        world: number of processes.
        device: ``cpu`` or ``cuda:<index>``.
        threads: CPU: batches computed at a time.
        workers: processes that decode.
    """

    config: PreprocessConfig
    manifest: Manifest
    share: range
    rank: int
    world: int
    device: str
    threads: int
    workers: int

    @property
    def own(self) -> range:
        """The shards of this process."""
        return self.share[self.rank :: self.world]


@dataclass(kw_only=True)
class Tally:
    """What one process has done, and where its time went, in seconds.

    Attributes:
        written: rows and bytes committed, rows that could not be decoded, the device's and the writer's time.
        images: rows gone through, invalid ones included, each once however many sources it was for.
        load_seconds: models loaded.
        calibrate_seconds: storage forms fitted and measured, or waited for while another process did.
        loop_seconds: the shard loop, from the first image to the last commit.
        decode_seconds: the loop waited for images; the device may have been computing meanwhile.
        lanes: batches computed at the same time; ``written.busy_seconds`` is a sum over them.
    """

    written: Written = field(default_factory=Written)
    images: int = 0
    load_seconds: float = 0.0
    calibrate_seconds: float = 0.0
    loop_seconds: float = 0.0
    decode_seconds: float = 0.0
    lanes: int = 1


def work(job: Job, images: ImageSource, report: Report) -> Tally:
    """Compute and write every missing shard of this process.

    Args:
        job: the share.
        images: the set's.
        report: called from the writer's thread after each batch with source → rows written, and with the
            number of images.

    Returns:
        What was done.

    Raises:
        RepaError: a model could not be loaded, a tolerance not be met, a feature was not finite, an image
            could not be read, the disk refused, or another process writes the same shards. Committed shards
            stay.
    """
    tally = Tally()
    present = present_manifest(job.config.cache)
    missing = {name: missing_shards(job.config.cache, present, name, job.own) for name in job.config.sources}
    if not any(missing.values()):
        return tally
    models = prepare_models(job, images, [name for name, shards in missing.items() if shards], tally)
    # only now: a model that cannot be loaded, or a tolerance that cannot be met, leaves nothing behind
    write_columns(job, images, models, missing, report, tally)
    return tally


def prepare_models(job: Job, images: ImageSource, sources: Sequence[str], tally: Tally) -> list[SourceModel]:
    """Load the models of some sources and settle how their columns are stored.

    Args:
        job: of the process.
        images: the set's.
        sources: names.
        tally: what it takes is noted there.

    Raises:
        RepaError: a model could not be loaded, a tolerance not be met, or the disk is too small.
    """
    import torch

    from ..encoders.precision import require_arithmetic
    from ..loading import load_models

    started = time.perf_counter()
    require_arithmetic(job.config.compute_dtype, torch.device(job.device))
    models = load_models(job.config, sources, job.device)
    tally.load_seconds = time.perf_counter() - started
    settles = calibrator(job, images)
    for model in models:
        model.prepare(settles)
    tally.calibrate_seconds = time.perf_counter() - started - tally.load_seconds
    declarations = {name: each for model in models for name, each in model.declarations.items()}
    if job.config.attention_kl is not None or job.config.attention_bytes is not None:
        # the plan did not know the components
        columns = {name: each.columns for name, each in declarations.items()}
        require_room_for(job.config.cache, job.manifest, columns, job.config.compress is not None)
    return models


def write_columns(
    job: Job,
    images: ImageSource,
    models: Sequence[SourceModel],
    missing: Mapping[str, Sequence[int]],
    report: Report,
    tally: Tally,
) -> None:
    """Compute and write shards by models that are loaded and prepared.

    Args:
        job: the share.
        images: the set's.
        models: of every source in ``missing`` that misses a shard.
        missing: source → shards to write.
        report: see `work`.
        tally: what is done is added to it.

    Raises:
        RepaError: see `work`.
    """
    declarations = {name: each for model in models for name, each in model.declarations.items()}
    manifest = ensure_cache(job.config.cache, job.manifest, images.keys, images.labels)
    for name, each in declarations.items():
        manifest = ensure_source(job.config.cache, name, each.provenance, each.columns)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(SourceWriter(job.config.cache, manifest, name, missing[name]))
            for name in declarations
        }
        for name, each in declarations.items():
            # until a shard is committed or locked, another command may have declared the source anew
            ensure_source(job.config.cache, name, each.provenance, each.columns)
        _Loop(job, manifest, images, models, writers, report, tally).run()


def calibrator(job: Job, images: ImageSource) -> Calibrator:
    """Make what settles the storage forms of a job's models, see `Calibrator`."""
    from ..columns.calibrator import Calibrator

    assert job.config.batch_size is not None, "the plan resolves the command"
    return Calibrator(
        job.config.cache,
        images,
        resolution=job.config.resolution,
        views=job.manifest.views,
        batch_size=job.config.batch_size,
        device=job.device,
        threads=job.threads,
    )


class _Loop:
    """The loop of `work`, with the locks held."""

    def __init__(
        self,
        job: Job,
        manifest: Manifest,
        images: ImageSource,
        models: Sequence[SourceModel],
        writers: Mapping[str, SourceWriter],
        report: Report,
        tally: Tally,
    ) -> None:
        self._job = job
        self._manifest = manifest
        self._images = images
        self._models = models
        self._writers = writers
        self._report = report
        self._tally = tally
        # another command may have committed some between the look at the commits and the locks
        self._remaining = {name: frozenset(writer.remaining) for name, writer in writers.items()}

    def run(self) -> None:
        from ..images.workers import decode_rows
        from ..lanes.lanes import open_lanes

        shards = sorted(frozenset[int]().union(*self._remaining.values()))
        rows = [row for shard in shards for row in self._manifest.shard_range(shard)]
        started = time.perf_counter()
        with (
            deferred_interrupts() as check,
            decode_rows(self._images, rows, self._job.config.resolution, self._job.workers) as decoded,
            open_lanes(self._job.device, self._job.threads) as lanes,
            WriterThread(
                self._writers,
                self._manifest,
                self._images.keys,
                depth=lanes.ahead,
                on_batch=self._advance,
                check=check,
            ) as writer,
        ):
            failure = self._feed(self._timed(decoded, check), lanes, writer)
        if failure is not None:
            raise failure
        self._tally.written = writer.written
        self._tally.lanes = lanes.count
        self._tally.loop_seconds = time.perf_counter() - started

    def _feed(
        self, decoded: Iterable[tuple[int, Decoded]], lanes: Lanes, writer: WriterThread
    ) -> RepaError | None:
        """Hand on all batches. An error is given back, as what was begun before it is to be written."""
        batch_size = self._job.config.batch_size
        assert batch_size is not None, "the plan resolves the command"
        try:
            for batch in batches(decoded, self._manifest, batch_size):
                writer.put(lanes.submit(batch, self._tasks(batch.shard)))
        except RepaError as error:
            return error
        return None

    def _tasks(self, shard: int) -> list[Task]:
        """Make one task for each model that some source misses in this shard, for those sources alone."""
        from ..images.views import in_each_view
        from ..lanes.lanes import Task

        tasks = []
        for model in self._models:
            sources = tuple(name for name in model.declarations if shard in self._remaining[name])
            if sources:
                compute = in_each_view(partial(model.encode, sources=sources), self._manifest.views)
                tasks.append(Task(model=model.name, sources=sources, compute=compute))
        return tasks

    def _timed(
        self, decoded: Iterator[tuple[int, Decoded]], check: Callable[[], None]
    ) -> Iterator[tuple[int, Decoded]]:
        while True:
            check()
            started = time.perf_counter()
            try:
                item = next(decoded)
            except StopIteration:
                return
            finally:
                self._tally.decode_seconds += time.perf_counter() - started
            yield item

    def _advance(self, sources: tuple[str, ...], rows: int) -> None:
        self._tally.images += rows
        self._report(dict.fromkeys(sources, rows), rows)
