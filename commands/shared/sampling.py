"""Batches of samples, in this process or in several, each written as it comes.

A batch is the same whoever makes it: its images depend on the seed, their labels and the batch alone.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol

from ...data.errors import RepaError
from ...pipeline.shard_loop.interrupts import terminated_as_interrupt
from ...pipeline.shard_loop.processes import deaf_to_interrupts, end_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.context import SpawnProcess
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from ...trainer.sampling.generate import TrainedModel
    from ...trainer.sampling.record import SamplingRecord

_GRACE_SECONDS = 5.0


class LatentDecoder(Protocol):
    """Latents to images."""

    def decode(self, latent: Tensor) -> Tensor:
        """Decode unscaled latents ``[B, C, h, w]`` to images uint8 ``[B, 3, H, W]``."""
        ...


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """What one process is to sample.

    Attributes:
        checkpoint: the file of the weights.
        random_autoencoder: whether the autoencoder's weights are drawn.
        record: of the whole sampling.
        condition: of each image of the whole sampling, ``[N, …]``; for labels int64 ``[N]``.
        batches: first image of each batch to make.
        folder: where to.
        device: where to compute.
        threads: of a CPU's matrix products; None leaves them.
    """

    checkpoint: Path
    random_autoencoder: bool
    record: SamplingRecord
    condition: NDArray[Any]
    batches: tuple[int, ...]
    folder: Path
    device: str
    threads: int | None = None


def sample_batches(
    job: SamplingJob, model: TrainedModel, decoder: LatentDecoder, report: Callable[[int], None]
) -> None:
    """Sample, decode and write the batches of a job.

    Args:
        job: what to sample.
        model: of the job's checkpoint, on its device.
        decoder: latents to images.
        report: called with the number of images of each batch that is written.

    Raises:
        RepaError: a latent or an image is not finite, or the disk refuses.
    """
    import torch

    from ...trainer.sampling.generate import generate
    from ...trainer.sampling.record import SampleFolder
    from ...trainer.sampling.sampler import SamplerConfig

    record = job.record
    folder = SampleFolder(job.folder, record)
    settings = SamplerConfig(
        solver=record.solver,
        steps=record.steps,
        guidance=record.guidance,
        guidance_cls=record.guidance_cls,
        interval=record.interval,
    )
    latents = generate(
        model,
        torch.from_numpy(job.condition),
        settings,
        seed=record.seed,
        batch_size=record.batch_size,
        batches=job.batches,
    )
    for first, part in zip(job.batches, latents, strict=True):
        folder.write_batch(first, decoder.decode(part).permute(0, 2, 3, 1).cpu().numpy())
        report(len(part))


def sample_in_processes(jobs: Sequence[SamplingJob], report: Callable[[int], None]) -> None:
    """Do several jobs, each in a process of its own.

    Args:
        jobs: one a process.
        report: called here with the number of images of each batch that a process has written.

    Raises:
        RepaError: of the first process that failed or was killed; the others are stopped, and what is written
            stays.
    """
    context = multiprocessing.get_context("spawn")
    children: list[SpawnProcess] = []
    listening: dict[Connection, int] = {}
    try:
        with deaf_to_interrupts():
            for number, job in enumerate(jobs):
                here, there = context.Pipe(duplex=False)
                child = context.Process(
                    target=_child, args=(job, there, os.getpid()), name=f"sample-{number}"
                )
                child.start()
                there.close()
                children.append(child)
                listening[here] = number
        while listening:
            for ready in wait(list(listening)):
                assert isinstance(ready, Connection)
                if _hear(ready, listening[ready], children, report):
                    del listening[ready]
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
        for child in children:
            child.join(_GRACE_SECONDS)
            if child.is_alive():
                child.kill()


def _hear(
    connection: Connection, number: int, children: Sequence[SpawnProcess], report: Callable[[int], None]
) -> bool:
    """Take what a process says, and tell whether that was its last word.

    Raises:
        RepaError: it failed, or was killed without a word.
    """
    try:
        kind, *values = connection.recv()
    except (EOFError, OSError):
        children[number].join(_GRACE_SECONDS)
        raise RepaError(
            f"sampling process {number} ended with status {children[number].exitcode}",
            "the same command goes on with what is missing",
            field="--devices",
        ) from None
    if kind == "failed":
        what, remedy, field = values
        raise RepaError(f"sampling process {number}: {what}", remedy, field=field)
    if kind == "report":
        report(*values)
    return bool(kind == "done")


def _child(job: SamplingJob, connection: Any, parent: int) -> None:
    """Do the job in a started process, and send a last word to its parent."""
    end_with_parent(parent)
    with suppress(KeyboardInterrupt), terminated_as_interrupt():
        try:
            import torch

            from ...trainer.sampling.generate import model_of_file
            from .decoder import Decoder

            if job.threads is not None:
                torch.set_num_threads(job.threads)
            model = model_of_file(job.checkpoint, weights=job.record.weights)
            model.backbone.to(job.device)
            decoder = Decoder(job.record.autoencoder, job.device, random_weights=job.random_autoencoder)
            sample_batches(job, model, decoder, lambda count: connection.send(("report", count)))
            connection.send(("done",))
        except RepaError as error:
            connection.send(("failed", error.what, error.remedy, error.field))
        except Exception as error:
            traceback.print_exc()
            connection.send(("failed", f"{type(error).__name__}: {error}", "", ""))
    connection.close()
