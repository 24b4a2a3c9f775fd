"""`repa plan` says what a cache will take and give, measured here, before anything runs."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from ..data.errors import RepaError
from ..data.format.columns import AUTOENCODER
from ..data.units import counted
from .preprocess import EncodingFlags, make_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from rich.console import Console

    from ..pipeline.captions.plan import CaptionPlan
    from ..pipeline.estimate import EncodingSpeed
    from ..pipeline.plan import Plan
    from .measure.disk import DiskSpeed

_STEPS = 3
_STEP_SECONDS = 5.0  # of a timed step on a CPU


@dataclass(frozen=True, kw_only=True)
class PlanFlags(EncodingFlags):
    """The flags of `repa plan`.

    They are those of the `repa preprocess` it foretells and of the training after it.
    """

    model: Annotated[
        str | None, typer.Option(help="Backbone to train, as SiT-B/2: steps of it are measured.")
    ] = None
    train_batch_size: Annotated[int, typer.Option(help="Images of a training step.")] = 32
    images_per_second: Annotated[
        float | None, typer.Option(help="Of the training, if it is known: nothing is measured then.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """When a cache has paid for itself against calling the teachers in every step.

    The latents are read from a cache either way, so only the teachers count. Live, a training image, in one
    view, takes
    its step and the teachers; from the cache its step or its reading, which goes on beside it, whichever is
    longer. Before that each of the N images of the set was encoded:
    images = N · encode / (step + live − max(step, read)).

    Attributes:
        encode_seconds: of the teachers and of writing what they give, for an image of the set in all views.
        live_seconds: of the teachers, decoding included, for a training image.
        read_seconds: of reading a training image's rows from the disk, page cache cold.
        step_seconds: of the training itself, for an image; 0 where it is not known.
        images: training images after which the cache is ahead; None: never.
    """

    encode_seconds: float
    live_seconds: float
    read_seconds: float
    step_seconds: float
    images: float | None


def break_even(
    count: int,
    *,
    encode_seconds: float,
    live_seconds: float,
    read_seconds: float,
    step_seconds: float = 0.0,
) -> BreakEven:
    """See `BreakEven`.

    Args:
        count: N, images of the set.
        encode_seconds: of the teachers and of writing, for an image of the set.
        live_seconds: of the teachers for a training image.
        read_seconds: of reading its rows.
        step_seconds: of training on it.
    """
    saved = step_seconds + live_seconds - max(step_seconds, read_seconds)
    return BreakEven(
        encode_seconds=encode_seconds,
        live_seconds=live_seconds,
        read_seconds=read_seconds,
        step_seconds=step_seconds,
        images=count * encode_seconds / saved if saved > 0 else None,
    )


def plan(flags: PlanFlags, *, console: Console | None = None) -> None:
    """Print what a `repa preprocess` of these flags takes, and what training from its cache needs and gets.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: as of `repa preprocess`; figures that are not above zero.
    """
    from ..data.storage.writable import measurable_folder
    from ..data.units import human_bytes
    from ..pipeline.captions.plan import make_caption_plan
    from ..pipeline.captions.run import show_captions
    from ..pipeline.estimate import measure_encoding
    from ..pipeline.plan import make_plan
    from ..pipeline.shard_loop.ranks import detect_rank
    from ..pipeline.summary import say, show_plan
    from .measure.disk import measure_disk
    from .shared.terminal import PlainConsole

    for flag, value in (
        ("--images-per-second", flags.images_per_second),
        ("--train-batch-size", flags.train_batch_size),
    ):
        if value is not None and value <= 0:
            raise RepaError(f"{flag} {value:g} is too small", "give more than 0")
    console = console or PlainConsole()
    config = make_config(flags)
    found = make_plan(config)
    captions = make_caption_plan(found, config)
    rank = detect_rank(os.environ, found.config.devices)
    show_plan(found, rank, console)
    if captions is not None:
        show_captions(captions, console)
        say(
            console,
            f"        {human_bytes(found.bytes + captions.bytes)} to write with the images"
            + ("" if found.free_bytes is None else f", {human_bytes(found.free_bytes)} free"),
        )
    row_bytes = training_bytes(found, captions)
    folder = measurable_folder(found.config.cache)
    may_write = folder is not None and os.access(folder, os.W_OK)
    disk = measure_disk(folder, row_bytes=row_bytes) if folder is not None and may_write else None
    _say_disk(folder, disk, console)
    with _busy("measuring the models", console):
        speed = measure_encoding(found)
    _say_encoding(found, speed, disk, console)
    rate, how = flags.images_per_second, "given"
    if rate is None and flags.model is not None:
        with _busy(f"measuring steps of {flags.model}", console):
            rate, how = _training_rate(found, flags.model, flags.train_batch_size)
    say(console, f"train   {_reading(row_bytes, rate, how, disk)}")
    if folder is not None and disk is not None:
        _say_feeding(found, captions, folder, disk, rate, console)
    _say_break_even(found, speed, disk, rate, console)


def _say_disk(folder: Path | None, disk: DiskSpeed | None, console: Console) -> None:
    from ..data.units import human_bytes
    from ..pipeline.summary import say

    if folder is None:
        say(console, "disk    none: the cache is in a bucket, whose speed is not measured")
    elif disk is None:
        say(console, f"disk    {folder} cannot be measured: it is full or read-only", style="yellow")
    else:
        say(
            console,
            f"disk    {human_bytes(disk.bytes)} in {folder}: written at {human_bytes(disk.write)}/s, read in "
            f"random rows, dropped from the page cache, at {human_bytes(disk.read)}/s",
        )


def _say_feeding(
    plan: Plan,
    captions: CaptionPlan | None,
    folder: Path,
    disk: DiskSpeed,
    rate: float | None,
    console: Console,
) -> None:
    """Say whether the page cache of this machine, or its disk, feeds the training."""
    from ..data.machine import available_memory
    from ..pipeline.summary import say
    from .measure.feeding import Feeding, measure_page_cache, verdict

    row_bytes, ranks = training_bytes(plan, captions), plan.config.devices
    with _busy("measuring the page cache", console):
        cached = measure_page_cache(folder, row_bytes=row_bytes, ranks=ranks)
    if cached is None:
        return
    texts = 0 if captions is None else captions.manifest.num_rows
    of_image = training_bytes(plan)
    feeding = Feeding(
        images=len(plan.images),
        bytes=len(plan.images) * len(plan.manifest.views) * of_image + texts * (row_bytes - of_image),
        row_bytes=row_bytes,
        memory=available_memory(),
        cached=cached,
        disk=disk.read,
        needed=rate,
        ranks=ranks,
        as_float=plan.config.feature_dtype != "int8" and bool(plan.config.encoders),
    )
    say(console, f"memory  {verdict(feeding)}", style="yellow" if feeding.suffices is False else "")


def _busy(doing: str, console: Console) -> AbstractContextManager[object]:
    """Show on a terminal what is being done, until it is."""
    return console.status(doing) if console.is_terminal else nullcontext()


def training_bytes(plan: Plan, captions: CaptionPlan | None = None) -> int:
    """Count the bytes that a training image reads in one view, of one caption.

    They are latent, tokens, queries and keys with their scales, and what text encoders gave of a caption.
    """
    return sum(
        spec.row_bytes
        for source in (*plan.sources, *(captions.sources if captions is not None else ()))
        for name, spec in source.columns.items()
        if not name.endswith("/cls")
    )


def _say_encoding(plan: Plan, speed: EncodingSpeed, disk: DiskSpeed | None, console: Console) -> None:
    from ..data.units import human_rate, human_seconds
    from ..pipeline.summary import say

    times = f"{speed.views} × " if speed.views > 1 else ""
    parts = [f"{name} {times}{_short(seconds)}" for name, seconds in speed.model_seconds.items()]
    parts.append(f"decoding {_short(speed.decode_seconds)}")
    devices = f" on {speed.devices} devices" if speed.devices > 1 else ""
    say(
        console,
        f"encode  {human_rate(speed.rate)}{devices}, measured on {counted(speed.images, 'image')}: "
        f"{', '.join(parts)} each",
    )
    seconds = plan.rows / speed.rate
    if disk is not None and plan.bytes / disk.write > seconds:
        say(console, f"time    {human_seconds(plan.bytes / disk.write)}: the disk is slower than the models")
    elif plan.rows:
        load = human_seconds(speed.load_seconds)
        say(
            console,
            f"time    {human_seconds(seconds)} for {counted(plan.rows, 'image')}, and {load} to load the "
            "models",
        )
    else:
        say(console, "time    none: every column is there")


def _reading(row_bytes: int, rate: float | None, how: str, disk: DiskSpeed | None) -> str:
    from ..data.units import human_bytes, human_rate

    each = f"an image reads {human_bytes(row_bytes)}"
    if disk is None:
        return f"{each}; what the disk gives is not known"
    if rate is None:
        return (
            f"{each}: this disk feeds {human_rate(disk.read / row_bytes)}; name the --model to measure what "
            "it takes, or --images-per-second"
        )
    needed = rate * row_bytes
    ratio = disk.read / needed
    verdict = f"this disk gives {_figure(ratio)} times that"
    if ratio < 1:
        verdict = f"this disk gives {ratio:.0%} of it: take a faster one, or a cache that fits into memory"
    return f"{each}: {human_rate(rate)} ({how}) need {human_bytes(needed)}/s; {verdict}"


def _say_break_even(
    plan: Plan, speed: EncodingSpeed, disk: DiskSpeed | None, rate: float | None, console: Console
) -> None:
    from ..pipeline.estimate import live_models
    from ..pipeline.summary import say

    teachers = live_models(plan, speed)
    if not teachers or disk is None:
        return
    count = len(plan.images)
    live, encode = (speed.seconds_of(teachers, views=views) / speed.devices for views in (1, speed.views))
    found = break_even(
        count,
        encode_seconds=max(encode, _teacher_bytes(plan) / disk.write),
        live_seconds=live,
        read_seconds=training_bytes(plan) / disk.read,
        step_seconds=1 / rate if rate is not None else 0.0,
    )
    if found.images is None:
        say(console, "pays    never", style="yellow")
    else:
        passes = found.images / count
        say(
            console,
            f"pays    for itself after {found.images:,.0f} training images, {passes:.2f} passes over the set",
        )
    beside = f"beside a step of {_short(found.step_seconds)}" if rate else "which no known step hides"
    say(
        console,
        f"        {', '.join(teachers)}: {_short(found.live_seconds)} of every training image live, decoding "
        f"included, or {_short(found.encode_seconds)} of each image of the set once; rows are read in "
        f"{_short(found.read_seconds)}, {beside}; latents come from the cache either way",
    )


def _short(seconds: float) -> str:
    return f"{_figure(1000 * seconds)} ms" if seconds < 1 else f"{_figure(seconds)} s"


def _figure(value: float) -> str:
    """Write a number with three figures, or with all of a larger one, and without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _teacher_bytes(plan: Plan) -> int:
    """Count the bytes that the teachers' columns take of an image, in all views."""
    return len(plan.manifest.views) * sum(
        spec.row_bytes
        for source in plan.sources
        if source.source != AUTOENCODER
        for spec in source.columns.values()
    )


def _training_rate(plan: Plan, model: str, batch_size: int) -> tuple[float, str]:
    """Measure images a second of steps of the backbone alone, forward, backward and AdamW, and say how.

    No method can be faster. A CPU computes an image after the other: where a step would take long, a part of
    its images is timed, and the optimizer by itself.
    """
    import torch

    from ..data.format.columns import MOMENTS
    from ..trainer.models.registry import build, config_of

    shape = next(
        spec.shape for source in plan.sources for name, spec in source.columns.items() if name == MOMENTS
    )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    settings = config_of(
        model,
        input_size=shape[1],
        in_channels=shape[0] // 2,
        num_classes=max(1, len(plan.manifest.class_names)),
    )
    backbone = build(settings).to(device)
    optimizer = torch.optim.AdamW(backbone.parameters())

    def timed(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def differentiate(images: int) -> None:
        latent = torch.randn((images, shape[0] // 2, *shape[1:]), device=device)
        labels = torch.zeros(images, dtype=torch.int64, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            prediction = backbone(latent, torch.rand(images, device=device), labels).prediction
        (prediction.float() - latent).square().mean().backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    size = batch_size if cuda else 1
    differentiate(size)
    update()
    if not cuda:
        size = max(1, min(batch_size, int(_STEP_SECONDS / timed(lambda: differentiate(1)))))
    computed, updated = (
        median(each)
        for each in zip(
            *((timed(lambda: differentiate(size)), timed(update)) for _ in range(_STEPS)), strict=True
        )
    )
    devices = plan.config.devices if cuda else 1
    how = f"measured, plain {model}, batch {batch_size}"
    how += f", {size} of its images timed" if size < batch_size else ""
    how += f", times {devices} devices" if devices > 1 else ""
    return devices * batch_size / (computed * batch_size / size + updated), how
