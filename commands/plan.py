"""`repa plan`: what a cache will take and give, measured here, before anything runs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..data.errors import RepaError
from .preprocess import EncodingFlags, make_config

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.disk import DiskSpeed
    from ..pipeline.estimate import EncodingSpeed
    from ..pipeline.plan import Plan

_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class PlanFlags(EncodingFlags):
    """The flags of `repa plan`: those of the `repa preprocess` it foretells, and of the training after it."""

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

    The latents are read from a cache either way, so only the teachers count. Encoded once, they take
    ``live_seconds`` for each of the N images of the set, and a training image then only its reading;
    live, they take ``live_seconds`` for each training image:
    images = N · live / (live − read).

    Attributes:
        live_seconds: of the teachers, decoding included, for an image.
        read_seconds: of reading a training image's rows from the disk, page cache cold.
        images: training images after which the cache is ahead; None: never.
    """

    live_seconds: float
    read_seconds: float
    images: float | None


def break_even(count: int, *, live_seconds: float, read_seconds: float) -> BreakEven:
    """See `BreakEven`.

    Args:
        count: N, images of the set.
        live_seconds: of the teachers for an image.
        read_seconds: of reading an image's rows.
    """
    saved = live_seconds - read_seconds
    images = count * live_seconds / saved if saved > 0 else None
    return BreakEven(live_seconds=live_seconds, read_seconds=read_seconds, images=images)


def plan(flags: PlanFlags, *, console: Console | None = None) -> None:
    """Print what a `repa preprocess` of these flags takes, and what training from its cache needs and gets.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: as of `repa preprocess`; figures that are not above zero.
    """
    from rich.console import Console

    from ..data.disk import measure_disk
    from ..data.units import human_bytes
    from ..pipeline.estimate import measure_encoding
    from ..pipeline.plan import make_plan, nearest_folder
    from ..pipeline.ranks import detect_rank
    from ..pipeline.summary import say, show_plan

    for flag, value in (
        ("--images-per-second", flags.images_per_second),
        ("--train-batch-size", flags.train_batch_size),
    ):
        if value is not None and value <= 0:
            raise RepaError(f"{flag} {value:g} is too small; give more than 0")
    console = console or Console()
    found = make_plan(make_config(flags))
    rank = detect_rank(os.environ, found.config.devices)
    show_plan(found, rank, console)
    row_bytes = training_bytes(found)
    folder = nearest_folder(found.config.cache)
    disk = measure_disk(folder, row_bytes=row_bytes) if os.access(folder, os.W_OK) else None
    if disk is None:
        say(console, f"disk    {folder} cannot be measured: it is full or read-only", style="yellow")
    else:
        say(
            console,
            f"disk    {human_bytes(disk.bytes)} in {folder}: written at {human_bytes(disk.write)}/s, read in "
            f"random rows, dropped from the page cache, at {human_bytes(disk.read)}/s",
        )
    speed = measure_encoding(found)
    _say_encoding(found, speed, disk, console)
    rate, how = flags.images_per_second, "given"
    if rate is None and flags.model is not None:
        rate = _training_rate(found, flags.model, flags.train_batch_size)
        how = f"measured, plain {flags.model}"
    say(console, f"train   {_reading(row_bytes, rate, how, disk)}")
    _say_break_even(found, speed, disk, row_bytes, console)


def training_bytes(plan: Plan) -> int:
    """Bytes that a training image reads: latent, tokens, queries and keys with their scales, one view."""
    return sum(
        spec.row_bytes
        for source in plan.sources
        for name, spec in source.columns.items()
        if not name.endswith("/cls")
    )


def _say_encoding(plan: Plan, speed: EncodingSpeed, disk: DiskSpeed | None, console: Console) -> None:
    from ..data.units import human_rate, human_seconds
    from ..pipeline.summary import say

    parts = [f"{name} {1000 * seconds:.3g} ms" for name, seconds in speed.model_seconds.items()]
    parts.append(f"decoding {1000 * speed.decode_seconds:.3g} ms")
    devices = f" on {speed.devices} devices" if speed.devices > 1 else ""
    say(
        console,
        f"encode  {human_rate(speed.rate)}{devices}, measured on {speed.images} images: "
        f"{', '.join(parts)} each",
    )
    seconds = plan.rows / speed.rate
    if disk is not None and plan.bytes / disk.write > seconds:
        say(console, f"time    {human_seconds(plan.bytes / disk.write)}: the disk is slower than the models")
    elif plan.rows:
        say(console, f"time    {human_seconds(seconds)} for {plan.rows} images")
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
    verdict = f"this disk gives {ratio:.3g} times that"
    if ratio < 1:
        verdict = f"this disk gives {ratio:.0%} of it: take a faster one, or a cache that fits into memory"
    return f"{each}: {human_rate(rate)} ({how}) need {human_bytes(needed)}/s; {verdict}"


def _say_break_even(
    plan: Plan, speed: EncodingSpeed, disk: DiskSpeed | None, row_bytes: int, console: Console
) -> None:
    from ..pipeline.estimate import live_models
    from ..pipeline.summary import say

    teachers = live_models(plan, speed)
    if not teachers or disk is None:
        return
    count = len(plan.images)
    found = break_even(count, live_seconds=speed.seconds_of(teachers), read_seconds=row_bytes / disk.read)
    names = ", ".join(teachers)
    each = f"{1000 * found.live_seconds:.3g} ms live, {1000 * found.read_seconds:.3g} ms read"
    if found.images is None:
        say(console, f"pays    never: an image of {names} takes {each}", style="yellow")
        return
    say(
        console,
        f"pays    for itself after {found.images:,.0f} training images, {found.images / count:.2f} passes "
        f"over the set: an image of {names} takes {each}",
    )


def _training_rate(plan: Plan, model: str, batch_size: int) -> float:
    """Images a second of steps of plain SiT, forward, backward and AdamW: no method can be faster."""
    import torch

    from ..data.columns import MOMENTS
    from ..trainer.models.sit import SiT, SiTConfig

    shape = next(
        spec.shape for source in plan.sources for name, spec in source.columns.items() if name == MOMENTS
    )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    settings = SiTConfig.named(
        model,
        input_size=shape[1],
        in_channels=shape[0] // 2,
        num_classes=max(1, len(plan.manifest.class_names)),
    )
    backbone = SiT(settings).to(device)
    optimizer = torch.optim.AdamW(backbone.parameters())
    latent = torch.randn((batch_size, shape[0] // 2, *shape[1:]), device=device)
    times = torch.rand(batch_size, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            velocity = backbone(latent, times, labels).velocity
        (velocity.float() - latent).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()

    step()
    started = time.perf_counter()
    for _ in range(_STEPS):
        step()
    return _STEPS * batch_size / (time.perf_counter() - started)
