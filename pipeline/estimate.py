"""The speed that a `repa preprocess` will have, from a few batches encoded through its own lanes."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.errors import RepaError
from ..data.format.columns import AUTOENCODER, model_of
from ..data.format.factor_layout import FactorLayout
from ..data.format.foreign import foreign_note
from .columns.calibrator import Calibrator
from .columns.factored import Form, factored_form
from .columns.forms import TokenForm, attention_form
from .images.views import in_each_view
from .images.workers import decode_row
from .lanes.batches import Batch
from .lanes.lanes import Task, open_lanes
from .loading import load_models
from .plan import present_manifest
from .run import share_out
from .shard_loop.ranks import Rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from ..data.format.manifest import Provenance
    from .columns.specs import AttentionSettings
    from .encoders.base import Encoder
    from .lanes.encoded import Pending
    from .lanes.lanes import Lanes
    from .plan import Plan

_DECODED = 8  # images that are decoded to see how long it takes; the others are these again
_TIMED = 2  # batches of each lane
_TIMED_SECONDS = 20.0  # for all of them: where a batch takes longer, fewer images of it tell as much


@dataclass(frozen=True, kw_only=True)
class EncodingSpeed:
    """What was measured in one process.

    Attributes:
        images: computed while the clock ran, each in all views.
        views: of an image.
        model_seconds: model → seconds of the device for a view of an image; lanes side by side count as one.
        decode_seconds: of one thread, for an image.
        load_seconds: of loading the models.
        decoders: threads or processes that decode.
        beside: whether decoding has processes of its own, and goes on beside the device.
        devices: devices that the command uses.
    """

    images: int
    views: int
    model_seconds: Mapping[str, float]
    decode_seconds: float
    load_seconds: float
    decoders: int
    beside: bool
    devices: int

    def seconds_of(self, models: Iterable[str], *, views: int = 1) -> float:
        """Sum the seconds of an image on one device for decoding, and these models in so many views."""
        computed = views * sum(self.model_seconds[name] for name in models)
        decoded = self.decode_seconds / self.decoders
        return max(computed, decoded) if self.beside else computed + decoded

    @property
    def rate(self) -> float:
        """Images a second of all models in all views, on all devices."""
        return self.devices / self.seconds_of(self.model_seconds, views=self.views)


def measure_encoding(plan: Plan) -> EncodingSpeed:
    """Encode a few batches of the images, of every source that is still to be written. Nothing is stored.

    What is fitted or measured before attention and int8 are written (`Calibrator`) is left out: it is done
    once.

    Args:
        plan: of the command; of one that has nothing left to do, its teachers are measured.

    Raises:
        RepaError: weights that are not there, images that cannot be read, a GPU with too little memory; or
            imported latents and no teacher.
    """
    missing = [source.source for source in plan.sources if source.missing]
    wanted = missing or [name for name in plan.config.sources if name != AUTOENCODER] or [AUTOENCODER]
    present = present_manifest(plan.config.cache)
    if wanted == [AUTOENCODER] and present is not None and foreign_note(present) is not None:
        raise RepaError(
            f"the latents of cache {plan.config.cache} were imported, and no teacher is asked for: "
            "there is no model to measure",
            "name a teacher with --encoder",
            field="--encoder",
        )
    job = share_out(plan, Rank())[0]
    started = time.perf_counter()
    models = load_models(job.config, wanted, job.device)
    load_seconds = time.perf_counter() - started
    tasks = []
    for model in models:
        model.prepare(_Uncalibrated())
        sources = tuple(model.declarations)
        compute = in_each_view(partial(model.encode, sources=sources), plan.manifest.views)
        tasks.append(Task(model=model.name, sources=sources, compute=compute))
    pixels, decode_seconds = _decode(plan)
    assert job.config.batch_size is not None, "the plan resolves the command"
    with open_lanes(job.device, job.threads) as lanes:
        size = _warm_up(lanes, tasks, pixels, job.config.batch_size, on_gpu=job.device != "cpu")
        rounds = _TIMED * lanes.count if lanes.count > 1 else 2 * _TIMED
        started = time.perf_counter()
        busy = _run(lanes, tasks, pixels, size, rounds)
        elapsed = time.perf_counter() - started
    images = rounds * size
    total, views = sum(busy.values()), len(plan.manifest.views)
    return EncodingSpeed(
        images=images,
        views=views,
        # lanes work side by side: the time that passed is shared among the models by how long each computed
        model_seconds={name: elapsed / images / views * seconds / total for name, seconds in busy.items()},
        decode_seconds=decode_seconds,
        load_seconds=load_seconds,
        decoders=job.workers or 1,
        beside=job.workers > 0 or lanes.count > 1,
        devices=job.config.devices,
    )


def live_models(plan: Plan, speed: EncodingSpeed) -> tuple[str, ...]:
    """Choose the teachers among the models that were measured. A live run would call them."""
    return tuple(name for name in speed.model_seconds if name in map(model_of, plan.config.encoders))


def _decode(plan: Plan) -> tuple[list[NDArray[np.uint8]], float]:
    """Decode some images, evenly spaced, and measure the seconds for one. A broken one is grey."""
    count = min(_DECODED, len(plan.images))
    side = plan.config.resolution
    pixels = []
    started = time.perf_counter()
    for number in range(count):
        decoded = decode_row(plan.images, number * len(plan.images) // count, side)
        pixels.append(np.full((3, side, side), 127, np.uint8) if isinstance(decoded, str) else decoded)
    return pixels, (time.perf_counter() - started) / count


def _warm_up(
    lanes: Lanes, tasks: Sequence[Task], pixels: Sequence[NDArray[np.uint8]], size: int, *, on_gpu: bool
) -> int:
    """Make the images of a batch that is to be timed.

    One thread of a CPU computes a batch, in a time that grows with its images: there, fewer will do.
    """
    if not on_gpu:
        _run(lanes, tasks, pixels, 1, lanes.count)
        started = time.perf_counter()
        _run(lanes, tasks, pixels, 1, lanes.count)
        fitting = int(_TIMED_SECONDS / _TIMED / (time.perf_counter() - started))
        if fitting < size:
            return max(1, fitting)
    _run(lanes, tasks, pixels, size, lanes.count)
    return size


def _run(
    lanes: Lanes, tasks: Sequence[Task], pixels: Sequence[NDArray[np.uint8]], size: int, count: int
) -> dict[str, float]:
    """Compute so many batches, and return model → seconds, summed over the lanes."""
    waiting: deque[Pending] = deque()
    busy: dict[str, float] = {}

    def finish() -> None:
        for name, seconds in waiting.popleft().result().seconds.items():
            busy[name] = busy.get(name, 0.0) + seconds

    for number in range(count):
        images = [pixels[(number * size + index) % len(pixels)] for index in range(size)]
        waiting.append(lanes.submit(Batch(shard=0, rows=list(range(size)), images=images), tasks))
        if len(waiting) == lanes.ahead:
            finish()
    while waiting:
        finish()
    return busy


class _Uncalibrated(Calibrator):
    """Storage forms that nothing was fitted for. They are as much work, and no file is written."""

    def __init__(self) -> None:
        pass

    def attention(
        self, encoder: Encoder, provenance: Provenance, settings: AttentionSettings
    ) -> tuple[Form, dict[str, Any]]:
        """Return the whole width, in the dtype that is asked for, or factors of three quarters of it."""
        if not settings.factored:
            return attention_form(encoder, settings, None), {}
        width, blocks = encoder.head_width, len(settings.blocks)
        components = (width // 4, width // 2)
        layout = FactorLayout(
            tokens=encoder.grid[0] * encoder.grid[1], components=((components,) * encoder.heads,) * blocks
        )
        basis = torch.eye(width, dtype=torch.float64).expand(blocks, encoder.heads, width, width)
        return factored_form(encoder, settings, layout, basis), {}

    def tokens(self, encoder: Encoder, provenance: Provenance, form: TokenForm) -> dict[str, Any]:
        """Return nothing, as nothing is measured."""
        return {}

    def deviations(self, measure: Callable[..., Any]) -> Mapping[str, Mapping[str, Any]]:
        """Return nothing, as nothing is measured."""
        return {}
