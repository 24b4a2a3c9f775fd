"""`repa cache repair` puts the same images through the same models again, where something is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.units import counted
from ...pipeline.images.names import default_cache
from ...pipeline.summary import say
from .info import check_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from ...data.storage.bucket import CachePath
    from ...data.upkeep.repair import RepairPlan
    from ...pipeline.replay.recorded import Given
    from ...pipeline.replay.repair import Repaired


def repair(
    *,
    cache: str | Path | None = None,
    data: str | None = None,
    vae: str | None = None,
    weights: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Check every byte of a cache, and write again what is not as committed, or not there.

    Args:
        cache: folder of the cache, or its address in a bucket; by default the only one under ``caches/``.
        data: the images it was made from; by default ``images``, of a cache of the demo ``demo``.
        vae: the autoencoder, if it no longer lies where the manifest says.
        weights: ``NAME=FILE`` of an encoder's weights.
        console: where to print; standard output by default.

    Raises:
        RepaError: a manifest that is damaged or of another cache, other images or weights than recorded, a
            disk that refuses.
        SystemExit: with status 1 when something is still wrong.
    """
    from ...data.format.captions import captions_path
    from ...data.storage.bucket import cache_path
    from ...data.upkeep.repair import plan_repair, restore_group
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    path = cache_path(cache or default_cache())
    captions = captions_path(path)
    for each in (path, captions):
        if restore_group(each):
            say(console, f"{each}: zarr.json was damaged, and is written again from the copy beside it")
    findings = check_bytes(path, console).findings
    text = [finding for finding in findings if str(finding.path).startswith(f"{captions}/")]
    images = [finding for finding in findings if finding not in text]
    plan = plan_repair(path, images)
    if not findings:
        say(console, f"{path}: all is as committed: nothing to repair")
        return
    given = given_of(data, vae, weights)
    if images:
        say(console, f"{path}: {_intention(plan)}")
        for repaired in _encode_again(path, plan, given, console):
            _say_what_became(console, repaired)
    if text:
        of_captions = plan_repair(captions, text)
        say(console, f"{captions}: {_intention(of_captions)}")
        for repaired in _encode_again(path, of_captions, given, console, captions=True):
            _say_what_became(console, repaired)
    left = check_bytes(path, console).findings
    for finding in left:
        say(console, str(finding))
    verdict = f"{counted(len(left), 'finding')} left" if left else "all is as committed"
    say(console, f"{path}: {verdict}")
    if left:
        raise SystemExit(1)


def given_of(data: str | None, vae: str | None, weights: Sequence[str]) -> Given:
    """Return what a user says of where images and models are."""
    from ...pipeline.replay.recorded import Given
    from ..shared.encoders import parse_weights

    return Given(data=data, vae=vae, weights=parse_weights(weights))


def _intention(plan: RepairPlan) -> str:
    parts = [
        f"{counted(len(shards), 'shard')} of {source} to encode"
        + (f" ({counted(len(plan.rows[source]), 'row')} known to be bad)" if source in plan.rows else "")
        for source, shards in plan.shards.items()
    ]
    parts += [f"the calibration of {source} to fit" for source in plan.calibrations]
    files = len(plan.documents) + len(plan.tables)
    parts += [f"{counted(files, 'file')} of metadata to write"] if files else []
    parts += (
        [f"{counted(len(plan.leftovers), 'file')} left by a killed writer to remove"]
        if plan.leftovers
        else []
    )
    return ", ".join(parts) or "nothing that encoding could repair"


def _encode_again(
    path: CachePath, plan: RepairPlan, given: Given, console: Console, *, captions: bool = False
) -> list[Repaired]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ...pipeline.replay.captions import repair_captions
    from ...pipeline.replay.repair import repair as repair_images

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    tasks = {}

    def report(source: str, done: int, total: int) -> None:
        if source not in tasks:
            tasks[source] = bars.add_task(source, total=total)
        bars.update(tasks[source], completed=done)

    with bars:
        return (repair_captions if captions else repair_images)(path, plan, given, report)


def _say_what_became(console: Console, repaired: Repaired) -> None:
    parts = [f"{len(repaired.shards)} encoded again"]
    if repaired.as_committed:
        parts.append(f"{len(repaired.as_committed)} byte for byte as committed")
    if repaired.other:
        shards = ", ".join(map(str, repaired.other))
        parts.append(
            f"not the bytes that were committed: shard {shards} (another device or library, or an image that "
            "was changed)"
        )
    if repaired.unknown:
        parts.append(f"{len(repaired.unknown)} without a record to compare with")
    say(console, f"  {repaired.source}: {', '.join(parts)}")
