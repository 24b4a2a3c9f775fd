"""Batches of samples, in this process or in several, each written as it comes.

A batch is the same whoever makes it: its images depend on the seed, their labels and the batch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from ...trainer.sampling.generate import TrainedModel
    from ...trainer.sampling.record import SamplingRecord
    from ...trainer.sampling.settings import SamplerConfig


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
        teacher_weights: file of the teacher of a model of tokens; None takes the hub's.
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
    teacher_weights: Path | None = None


def settings_of(record: SamplingRecord) -> SamplerConfig:
    """Return how a sampling is made."""
    from ...trainer.sampling.settings import SamplerConfig

    return SamplerConfig(
        solver=record.solver,
        steps=record.steps,
        shift=record.shift,
        guidance=record.guidance,
        guidance_cls=record.guidance_cls,
        guidance_channels=record.guidance_channels,
        interval=record.interval,
    )


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

    record = job.record
    folder = SampleFolder(job.folder, record)
    settings = settings_of(record)
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


def sample_in_process(job: SamplingJob, report: Callable[[int], None]) -> None:
    """Do a job in a process that has loaded nothing yet.

    Args:
        job: what to sample.
        report: called with the number of images of each batch that is written.

    Raises:
        RepaError: as of `sample_batches`, or the model or the autoencoder cannot be loaded.
    """
    import torch

    from ...trainer.sampling.generate import model_of_file, with_scale
    from .decoder import decoder_for

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    model = model_of_file(job.checkpoint, weights=job.record.weights, family=job.record.family)
    model.backbone.to(job.device)
    decoder = decoder_for(
        model,
        job.record.autoencoder,
        job.device,
        random_weights=job.random_autoencoder,
        teacher_weights=job.teacher_weights,
    )
    sample_batches(job, with_scale(model, decoder), decoder, report)
