"""Encoding the captions of a cache from end to end, one text encoder after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...data.format.opening import open_manifest
from ...data.format.survey import committed_shards
from ...data.units import counted, human_bytes, human_rate, human_seconds
from ...data.writing.captions import ensure_captions
from ...data.writing.store import ensure_cache, ensure_source
from ..plan import present_manifest
from ..progress import ProgressView
from ..shard_loop.devices import device_shares
from ..summary import say, text_deviations, warn_of_random_weights
from .worker import CaptionJob, load_text_model, work_captions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from ..plan import Plan
    from ..shard_loop.ranks import Rank
    from ..shard_loop.worker import Tally
    from ..source_plan import SourcePlan
    from .plan import CaptionPlan


def run_captions(plan: Plan, captions: CaptionPlan, rank: Rank, console: Console) -> None:
    """Write every column of the captions that is not written yet.

    Args:
        plan: of the images, whose cache is made if it is not there.
        captions: what is left to do.
        rank: this process.
        console: for progress and what was written.

    Raises:
        RepaError: see `work_captions`.
    """
    ensure_cache(captions.config.cache, plan.manifest, plan.images.keys, plan.images.labels)
    ensure_captions(captions.config.cache, captions.captions.of_images, _record(captions))
    warn_of_random_weights(captions.sources, console)
    for source in captions.sources:
        if source.missing:
            tallies = _work(captions, source, rank, console)
            _show(captions, source, tallies, rank, console)
        elif source.source in captions.config.weights:
            _check_weights(captions, source)


def saved_captions(captions: CaptionPlan) -> list[str]:
    """Return how many captions of each text encoder are on the disk, in words."""
    manifest = present_manifest(captions.path)
    parts = []
    for source in captions.config.text_encoders:
        known = manifest is not None and source in manifest.sources
        done = committed_shards(captions.path, manifest, source) if manifest is not None and known else []
        rows = sum(len(captions.manifest.shard_range(shard)) for shard in done)
        parts.append(f"{rows} of {counted(len(captions.texts), 'caption')} of {source}")
    return parts


def show_captions(captions: CaptionPlan, console: Console) -> None:
    """Print which captions there are, what is left to do, and how much that is."""
    found = captions.captions
    each = f", the first {found.per_image} of each image" if found.left_out else ""
    say(
        console,
        f"captions {found.name}: {counted(found.count, 'caption', ',')} of "
        f"{counted(len(found.of_images) - found.without, 'image', ',')}{each}; "
        f"{counted(len(captions.texts), 'distinct one', ',')}, the empty one among them",
    )
    for line in _remarks(captions):
        say(console, f"        note: {line}", style="yellow")
    for source in captions.sources:
        columns = ", ".join(
            f"{name.partition('/')[2]} {spec.dtype}{list(spec.shape)}"
            for name, spec in source.columns.items()
        )
        row = sum(spec.row_bytes for spec in source.columns.values())
        drawn = ", random weights" if source.drawn else ""
        todo = f"{human_bytes(source.bytes)} to write" if source.missing else "complete"
        say(
            console,
            f"        {source.source}{drawn}: {columns}; {human_bytes(row)} a caption, {todo}",
        )


def _remarks(captions: CaptionPlan) -> list[str]:
    found = captions.captions
    without, strangers, left = found.without, found.strangers, found.left_out
    lines = []
    if without:
        lines.append(f"{counted(without, 'image', ',')} without a caption: the empty one stands for it")
    if strangers:
        lines.append(f"{counted(strangers, 'caption', ',')} of images that are not here, passed over")
    if left:
        lines.append(f"{counted(left, 'caption', ',')} beyond --captions-per-image, left out")
    return lines


def _record(captions: CaptionPlan) -> dict[str, object]:
    found = captions.captions
    return {
        "kind": found.kind,
        "captions": found.count,
        "captions_per_image": found.per_image,
        "left_out": found.left_out,
        "images_without": found.without,
        "strangers": found.strangers,
    }


def _work(captions: CaptionPlan, source: SourcePlan, rank: Rank, console: Console) -> list[Tally]:
    name = source.source
    config = replace(captions.config, batch_size=captions.batch_sizes[name])
    jobs = [
        CaptionJob(
            config=config,
            source=name,
            manifest=captions.manifest,
            share=captions.share,
            rank=each.rank,
            world=each.world,
            device=each.device,
            threads=each.threads,
            missing=source.missing,
        )
        for each in device_shares(config, rank, captions.share, source.missing)
    ]
    if rank.rank > 0:
        return [work_captions(jobs[0], captions.texts, _silent)]
    own = [shard for shard in captions.share[rank.rank :: rank.world] if shard in source.missing]
    rows = sum(len(captions.manifest.shard_range(shard)) for shard in own)
    with ProgressView(console, {name: rows}, rows, noun="caption") as view:
        if len(jobs) == 1:
            return [work_captions(jobs[0], captions.texts, view.advance)]
        from ..shard_loop.processes import work_in_processes

        return work_in_processes(jobs, captions.texts, view.advance, do=work_captions)


def _silent(rows: Mapping[str, int], count: int) -> None:
    """Rank 0 shows the progress."""


def _show(
    captions: CaptionPlan, source: SourcePlan, tallies: Sequence[Tally], rank: Rank, console: Console
) -> None:
    name = source.source
    rows = sum(tally.images for tally in tallies)
    loop = max((tally.loop_seconds for tally in tallies), default=0.0)
    load = max((tally.load_seconds for tally in tallies), default=0.0)
    size = sum(sum(tally.written.bytes.values()) for tally in tallies)
    rate = f", {human_rate(rows / loop, 'captions')}" if loop else ""
    whose = f" (process {rank.rank} of {rank.world}; the others write the rest)" if rank.world > 1 else ""
    say(
        console,
        f"wrote {name} of {counted(rows, 'caption', ',')} to {captions.path}, {human_bytes(size)}, in "
        f"{human_seconds(loop)}{rate}, after {human_seconds(load)} to load it{whose}",
    )
    for line in text_deviations(open_manifest(captions.path), [name]):
        say(console, f"  {line}")


def _check_weights(captions: CaptionPlan, source: SourcePlan) -> None:
    """Hold weights that the command names against a complete source, which nothing else would load.

    Raises:
        CacheError: it was made with others.
    """
    name = source.source
    config = replace(captions.config, batch_size=captions.batch_sizes[name])
    model = load_text_model(config, name, "cpu")
    provenance = model.encoder.provenance(captions.batch_sizes[name])
    ensure_source(captions.path, name, provenance, model.form.columns)
