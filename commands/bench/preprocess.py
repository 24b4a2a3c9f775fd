"""`repa preprocess` against the bare forward passes on images that already lie in memory."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ...data.units import counted
from ...pipeline.config import PreprocessConfig
from ...pipeline.encoders import find_teacher
from ...pipeline.images.names import DEMO_DATA
from ...pipeline.images.workers import decode_row
from ...pipeline.loading import load_models
from ...pipeline.plan import make_plan
from ...pipeline.run import share_out
from ...pipeline.shard_loop.ranks import detect_rank
from ...pipeline.shard_loop.worker import work
from .measured import Measured, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from ...pipeline.columns.models import SourceModel
    from .measured import BenchSettings

# about the size of ImageNet's photographs
PHOTOGRAPH = (500, 375)
ATTENTION_RANK = 16


def bench_preprocess(settings: BenchSettings, room: Path) -> tuple[str, str, list[Measured]]:
    """Measure images per second of the bare forward passes and of the whole shard loop.

    Both run the same autoencoder and teacher in the same batch size; the bare passes use torch's own threads.
    The demo's teacher encodes the demo's drawn images; any other encodes JPEG files the size of photographs.
    Loading models and calibrating, which do not grow with the number of images, are left out.
    """
    demo = settings.encoder == DEMO_DATA
    data = DEMO_DATA if demo else str(_photographs(room / "images", settings.images))
    config = PreprocessConfig(
        data=data,
        cache=room / "unused",
        encoders=(settings.encoder,),
        resolution=settings.side,
        limit=settings.images,
        batch_size=settings.batch_size,
        random_weights=not demo,
        shard_rows=max(settings.images // 4, 1),
    )
    plan = make_plan(config)
    [job] = share_out(plan, detect_rank({}, 1))
    models = load_models(plan.config, plan.config.sources, job.device)
    pixels = [decode_row(plan.images, row, settings.side) for row in range(len(plan.images))]
    images = torch.from_numpy(np.stack([each for each in pixels if not isinstance(each, str)]))
    numbers = count()
    variants: dict[str, Callable[[], float]] = {
        "bare forward passes": partial(_bare, models, images, settings.batch_size, job.device),
        "repa preprocess": lambda: _whole(config, room / f"cache-{next(numbers)}"),
    }
    depth = find_teacher(settings.encoder).depth
    whole = replace(config, attention={settings.encoder: tuple(range(depth - 2, depth + 1))})
    cut = replace(whole, attention_rank=ATTENTION_RANK)
    for form, stored in (("whole, float16", whole), (f"int8, rank {ATTENTION_RANK}", cut)):
        variants[f"repa preprocess, and attention of 3 blocks, {form}"] = partial(
            lambda each: _whole(each, room / f"cache-{next(numbers)}"), stored
        )
    rates = interleaved(variants, settings.rounds)
    lines = [Measured(name=name, rates=values) for name, values in rates.items()]
    what = f"{settings.encoder} and {'the demo’s autoencoder' if demo else 'SD-VAE, random weights'}"
    size = f"{counted(settings.images, 'image')} of {settings.side}², batch {settings.batch_size}"
    return f"preprocess: {what}, {size}", "images/s", lines


def _bare(models: Iterable[SourceModel], images: torch.Tensor, batch_size: int, device: str) -> float:
    started = time.perf_counter()
    for model in models:
        for batch in torch.split(images, batch_size):
            model.encode(batch.to(device), model.sources)
    if device != "cpu":
        torch.cuda.synchronize()
    return len(images) / (time.perf_counter() - started)


def _whole(config: PreprocessConfig, cache: Path) -> float:
    plan = make_plan(replace(config, cache=cache))
    [job] = share_out(plan, detect_rank({}, 1))
    tally = work(job, plan.images, lambda rows, images: None)
    return tally.images / tally.loop_seconds


def _photographs(folder: Path, images: int) -> Path:
    """Write smooth noise as JPEG files, which are as costly to decode as photographs."""
    generator = np.random.Generator(np.random.Philox(0))
    (folder / "noise").mkdir(parents=True)
    for number in range(images):
        coarse = Image.fromarray(generator.integers(256, size=(48, 64, 3), dtype=np.uint8))
        smooth = coarse.resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
        smooth.save(folder / "noise" / f"{number:05d}.jpg", quality=92)
    return folder
