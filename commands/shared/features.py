"""Features of images, computed batch by batch in threads, processes or ranks, each batch kept as it comes.

A batch is a fixed range of images and one forward pass: on a CPU of one thread, for PyTorch's own threads
change the last bits. So features depend on the images alone, not on who computed them.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...data.errors import CacheError, RepaError
from ...data.format.opening import as_recorded
from ...pipeline.encoders import find_teacher, load_encoder
from ...pipeline.encoders.clip_similarity import DEFAULT as DEFAULT_CLIP
from ...pipeline.encoders.clip_similarity import NAME as CLIP
from ...pipeline.encoders.clip_similarity import ClipSimilarity
from ...pipeline.encoders.inception import NAME as INCEPTION
from ...pipeline.encoders.inception import Inception
from ...pipeline.images.open import open_source
from ...pipeline.images.workers import decode_row
from ...pipeline.lanes.threads import one_thread_lanes
from ...trainer.evaluation.networks import BATCH, POOL, features_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.format.manifest import Provenance
    from ...pipeline.encoders.base import Encoder
    from ...trainer.evaluation.feature_shards import FeatureShards
    from ...trainer.evaluation.networks import FeatureNetwork
    from ...trainer.sampling.record import SampleFolder, SamplingRecord

    Batches = Callable[[int, int], NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """A feature network that any process can load.

    Attributes:
        name: ``inception``, ``clip``, or of an encoder.
        weights: file of its weights, of CLIP the folder or the hub's name; None takes the hub's, or what the
            package carries.
        resolution: side of the images, R; an encoder's grid depends on it.
        recorded: what the reference cache says of the encoder; None without.
    """

    name: str
    weights: Path | str | None
    resolution: int
    recorded: Provenance | None = None

    def load(self, device: str) -> FeatureNetwork:
        """Load the network.

        Raises:
            RepaError: its weights cannot be had.
            CacheError: they are not those that the cache was written with.
        """
        if self.name == CLIP:
            return ClipSimilarity(str(self.weights or DEFAULT_CLIP), device=device)
        weights = None if self.weights is None else Path(self.weights)
        if self.name == INCEPTION:
            return Inception(weights, device=device)
        recorded = self.recorded
        encoder = load_encoder(
            find_teacher(self.name),
            resolution=self.resolution,
            device=device,
            compute_dtype="float32" if recorded is None else recorded.compute_dtype,
            weights=weights,
            random_weights=recorded is not None and recorded.random_weights,
        )
        found = encoder.provenance(BATCH)
        if recorded is not None:
            found = as_recorded(found, [recorded])
            if found.weights_sha256 != recorded.weights_sha256:
                raise CacheError(
                    f"{self.name} is not the encoder of the reference: its weights have sha256 "
                    f"{found.weights_sha256[:12]}…, the cache's {recorded.weights_sha256[:12]}…",
                    f"give the cache's with --encoder-weights {self.name}=FILE",
                    field="--encoder-weights",
                )
        return EncoderFeatures(encoder, found, device)


class EncoderFeatures:
    """The class vectors of an encoder of the cache, see `FeatureNetwork`.

    Args:
        encoder: computes them.
        provenance: what it is.
        device: where it computes.
    """

    def __init__(self, encoder: Encoder, provenance: Provenance, device: str) -> None:
        self._encoder = encoder
        self.name = encoder.name
        self.weights_sha256 = provenance.weights_sha256
        self.random_weights = provenance.random_weights
        self.widths: Mapping[str, int] = {POOL: encoder.width}
        self.device = torch.device(device)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the class vectors ``[B, D]`` of uint8 images ``[B, 3, R, R]``."""
        return {POOL: self._encoder.encode(images)["cls"]}


class ImageSpec(Protocol):
    """Images that any process can open."""

    def open(self, device: str) -> Batches:
        """Return what gives images ``first`` to ``last``, uint8 ``[B, R, R, 3]``.

        Raises:
            RepaError: what they come from cannot be had.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FileImages:
    """Images that are there already, see `ImageSpec`."""

    images: Any

    def open(self, device: str) -> Batches:
        """Return the set's own method."""
        del device
        batch: Batches = self.images.batch
        return batch


@dataclass(frozen=True, kw_only=True)
class GeneratedImages:
    """Images that a model samples, see `ImageSpec`.

    Attributes:
        checkpoint: file of the model.
        record: of the sampling.
        condition: of each image, ``[N, …]``.
        random_autoencoder: whether the autoencoder's weights are drawn.
        teacher_weights: file of the teacher of a model of tokens; None takes the hub's.
    """

    checkpoint: Path
    record: SamplingRecord
    condition: NDArray[Any]
    random_autoencoder: bool
    teacher_weights: Path | None = None

    def open(self, device: str) -> Batches:
        """Load model and autoencoder, and return what samples and decodes.

        Raises:
            RepaError: either cannot be had.
        """
        from ...trainer.sampling.generate import generate, model_of_file, with_scale
        from .decoder import decoder_for
        from .sampling import settings_of

        model = model_of_file(self.checkpoint, weights=self.record.weights, family=self.record.family)
        model.backbone.to(device)
        decoder = decoder_for(
            model,
            self.record.autoencoder,
            device,
            random_weights=self.random_autoencoder,
            teacher_weights=self.teacher_weights,
        )
        model = with_scale(model, decoder)
        condition, settings = torch.from_numpy(self.condition), settings_of(self.record)

        def batch(first: int, last: int) -> NDArray[np.uint8]:
            if last - first > BATCH:
                raise ValueError(f"images {first} to {last} are more than a batch")
            (latents,) = generate(
                model, condition, settings, seed=self.record.seed, batch_size=BATCH, batches=(first,)
            )
            found: NDArray[np.uint8] = decoder.decode(latents).permute(0, 2, 3, 1).cpu().numpy()
            return found

        return batch


@dataclass(frozen=True, kw_only=True)
class SourceImages:
    """Images of a folder as a cache has them, cropped and scaled, see `ImageSpec`.

    Attributes:
        data: the folder.
        resolution: side of the crop, R.
        count: number of images.
        sha256: of their names and sizes.
    """

    data: str
    resolution: int
    count: int
    sha256: str

    def open(self, device: str) -> Batches:
        """List the folder, and return what decodes and crops.

        Raises:
            RepaError: it cannot be listed.
        """
        import numpy as np

        del device
        source = open_source(self.data, labels="none")

        def batch(first: int, last: int) -> NDArray[np.uint8]:
            rows = []
            for row in range(first, last):
                pixels = decode_row(source, row, self.resolution)
                if isinstance(pixels, str):
                    raise RepaError(
                        f"image {source.keys[row]} of {self.data} cannot be decoded ({pixels})",
                        "take it out of the reference",
                        field="--reference",
                    )
                rows.append(pixels)
            return np.stack(rows).transpose(0, 2, 3, 1)

        return batch


@dataclass(frozen=True, kw_only=True)
class FeatureJob:
    """What one process is to compute.

    Attributes:
        images: where images come from.
        networks: what computes features.
        shards: where those of each network go.
        batches: first image of each batch.
        count: number of images of the whole set.
        device: where to compute.
        threads: of a CPU, each computing a batch.
        keep: where the images are written too; None keeps none.
    """

    images: ImageSpec
    networks: tuple[NetworkSpec, ...]
    shards: tuple[FeatureShards, ...]
    batches: tuple[int, ...]
    count: int
    device: str
    threads: int
    keep: SampleFolder | None = None


def compute_features(job: FeatureJob, report: Callable[[int], None]) -> None:
    """Compute and write the features of a job's batches.

    Args:
        job: what to compute.
        report: called with the number of images of each batch that is written.

    Raises:
        RepaError: images or weights cannot be had, something is not finite, or the disk refuses.
    """
    if job.device == "cpu":
        lanes = one_thread_lanes(job.threads)
        try:
            images, networks = _load(job)
            for count in _ahead(lanes, lambda first: _batch(job, images, networks, first), job):
                report(count)
        finally:
            lanes.shutdown(cancel_futures=True)
        return
    images, networks = _load(job)
    for first in job.batches:
        report(_batch(job, images, networks, first))


def _load(job: FeatureJob) -> tuple[Batches, tuple[FeatureNetwork, ...]]:
    return job.images.open(job.device), tuple(each.load(job.device) for each in job.networks)


def _ahead(lanes: Any, do: Callable[[int], int], job: FeatureJob) -> Iterator[int]:
    """Yield results as they come, never more than two batches a thread being asked for."""
    waiting: set[Future[int]] = set()
    for first in job.batches:
        waiting.add(lanes.submit(do, first))
        if len(waiting) >= 2 * job.threads:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (each.result() for each in done)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (each.result() for each in done)


def _batch(job: FeatureJob, images: Batches, networks: Sequence[FeatureNetwork], first: int) -> int:
    last = min(first + BATCH, job.count)
    try:
        pixels = images(first, last)
        if job.keep is not None:
            job.keep.write_batch(first, pixels)
        for network, shards in zip(networks, job.shards, strict=True):
            shards.write(first, pixels, features_of(network, pixels, first=first))
    except torch.OutOfMemoryError as error:
        raise RepaError(
            f"{job.device} has too little memory for {BATCH} images at once",
            "take a larger device: figures depend on how many images a pass has, so it stays",
            field="--devices",
        ) from error
    return last - first
