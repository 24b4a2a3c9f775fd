"""`repa preprocess` from end to end, which plans, shares the shards out, watches and sums up."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.errors import CacheError, RepaError
from ..data.format.columns import AUTOENCODER, model_of
from ..data.format.survey import committed_shards
from ..data.launchers import tasks_without_srun
from ..data.units import counted
from ..data.upkeep.imported import settle_images
from ..data.upkeep.latent_statistics import settle_latent_statistics
from ..data.writing.store import ensure_source
from .captions.plan import make_caption_plan
from .captions.run import run_captions, saved_captions, show_captions
from .images.matched import MatchedImages
from .plan import make_plan, present_manifest
from .progress import ProgressView
from .shard_loop.devices import device_shares
from .shard_loop.interrupts import terminated_as_interrupt
from .shard_loop.ranks import Rank, detect_rank
from .shard_loop.worker import Job, Tally, work
from .shares import AUTO_SHARDS
from .summary import say, show_plan, show_summary, warn_of_random_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from ..data.storage.bucket import CachePath
    from .captions.plan import CaptionPlan
    from .config import PreprocessConfig
    from .plan import Plan
    from .shard_loop.on_ray import RayPool


class StoppedError(Exception):
    """The run was stopped from outside (Ctrl-C, SIGTERM). The message says what is saved."""


def run(
    config: PreprocessConfig, console: Console, *, dry_run: bool = False, pool: RayPool | None = None
) -> Plan:
    """Write every column of the command that is not written yet.

    Args:
        config: the command.
        console: for the plan, progress and summary.
        dry_run: stop after the plan.
        pool: workers of a Ray cluster, which do the work; None: this process and those it starts do.

    Returns:
        What was left to do when it began.

    Raises:
        RepaError: a mistake the user can mend, in one line; committed shards stay.
        StoppedError: stopped from outside; committed shards stay.
    """
    started = time.perf_counter()
    rank = detect_rank(os.environ, config.devices)
    if pool is not None and rank.launcher is not None:
        raise RepaError(
            f"--launcher ray within process {rank.rank} of {rank.world} that {rank.launcher} started",
            "give the command once, Ray starts the workers",
            field="--launcher",
        )
    plan = make_plan(config)
    captions = make_caption_plan(plan, config)
    if rank.rank == 0:
        show_plan(plan, rank, console)
        if captions is not None:
            show_captions(captions, console)
        if tasks := tasks_without_srun():
            note = f"this job has {tasks} tasks and runs without srun: one process does all of it"
            say(console, f"note: {note}", style="yellow")
        if config.shards is None and os.environ.get("SLURM_ARRAY_TASK_COUNT", "1") != "1":
            note = f"this is a task of a job array: with --shards {AUTO_SHARDS} each does shards of its own"
            say(console, f"note: {note}", style="yellow")
    if plan.rows or (captions is not None and captions.rows):
        plan.require_room(captions.least_bytes if captions is not None else 0)
    if dry_run:
        return plan
    _check_given_weights(plan, config)
    if isinstance(plan.images, MatchedImages) and plan.rows:
        settle_images(plan.config.cache, plan.images.matched_fingerprint)
    with terminated_as_interrupt():
        try:
            _run_images(plan, rank, pool, console, started)
            if captions is not None:
                if pool is not None and captions.rows:
                    say(console, "note: captions are encoded by this process, not by Ray", style="yellow")
                run_captions(plan, captions, rank, console)
        except KeyboardInterrupt:
            raise StoppedError(saved(plan, captions)) from None
    return plan


def _run_images(plan: Plan, rank: Rank, pool: RayPool | None, console: Console, started: float) -> None:
    """Write the columns of the images."""
    if not plan.rows:
        _settle_what_a_kill_left(plan.config.cache)
        say(console, _nothing_to_do(plan))
        return
    warn_of_random_weights(plan.sources, console)
    if pool is None:
        tallies = _work(plan, rank, share_out(plan, rank), console)
    else:
        tallies = _on_ray(plan, pool, console)
    settle_latent_statistics(plan.config.cache)
    show_summary(plan, rank, tallies, time.perf_counter() - started, console)


def _nothing_to_do(plan: Plan) -> str:
    """Say that all is there, of the cache or of the shards that the command is about."""
    if plan.config.shards is None:
        return f"{plan.config.cache} is complete: nothing to do"
    return f"{counted(len(plan.share), 'shard')} of {plan.config.cache} are this job's: nothing to do"


def _settle_what_a_kill_left(cache: CachePath) -> None:
    """Note the statistics of latents whose last shard was committed just before a kill.

    Caches from before there were statistics stay as they are: `repa cache upgrade` is for them.
    """
    from .encoders.weights import REPA

    manifest = present_manifest(cache)
    latents = None if manifest is None else manifest.sources.get(AUTOENCODER)
    if latents is not None and REPA in latents.libraries:
        settle_latent_statistics(cache)


def saved(plan: Plan, captions: CaptionPlan | None = None) -> str:
    """Say in one line what of each source is on the disk."""
    cache = plan.config.cache
    manifest = present_manifest(cache)
    parts = []
    for source in plan.config.sources:
        known = manifest is not None and source in manifest.sources
        done = committed_shards(cache, manifest, source) if manifest is not None and known else []
        images = sum(len(plan.manifest.shard_range(shard)) for shard in done)
        parts.append(f"{images} of {counted(len(plan.images), 'image')} of {source}")
    if captions is not None:
        parts += saved_captions(captions)
    return f"interrupted: {', '.join(parts)} are saved in {cache}; the same command resumes"


def share_out(plan: Plan, rank: Rank) -> list[Job]:
    """Return the jobs of this process, its own or those of the processes it is to start.

    A process whose shards are all there is not started.

    Raises:
        RepaError: more devices than there are, or than the cores can serve; a compute dtype of GPUs without
            one.
    """
    missing = frozenset[int]().union(*(source.missing for source in plan.sources))
    return [
        Job(config=plan.config, manifest=plan.manifest, share=plan.share, **each._asdict())
        for each in device_shares(plan.config, rank, plan.share, missing)
    ]


def _work(plan: Plan, rank: Rank, jobs: list[Job], console: Console) -> list[Tally]:
    if rank.rank > 0:
        return [work(jobs[0], plan.images, _silent)]
    own = plan.share[rank.rank :: rank.world]

    def rows(shards: frozenset[int]) -> int:
        return sum(len(plan.manifest.shard_range(shard)) for shard in shards if shard in own)

    totals = {source.source: rows(frozenset(source.missing)) for source in plan.sources}
    images = rows(frozenset[int]().union(*(source.missing for source in plan.sources)))
    if len(jobs) < plan.config.devices:
        idle = counted(plan.config.devices - len(jobs), "process")
        say(console, f"note: {idle} fewer than --devices: what is left to do are shards of {len(jobs)}")
    with ProgressView(console, totals, images) as view:
        if len(jobs) == 1:
            return [work(jobs[0], plan.images, view.advance)]
        from .shard_loop.processes import work_in_processes

        return work_in_processes(jobs, plan.images, view.advance)


def _on_ray(plan: Plan, pool: RayPool, console: Console) -> list[Tally]:
    from .shard_loop.on_ray import work_on_ray

    totals = {source.source: source.rows for source in plan.sources}
    with ProgressView(console, totals, plan.rows) as view:
        return work_on_ray(
            plan, pool, view.advance, lambda note: say(console, f"note: {note}", style="yellow")
        )


def _silent(rows: Mapping[str, int], images: int) -> None:
    """Rank 0 shows the progress."""


def _check_given_weights(plan: Plan, asked: PreprocessConfig) -> None:
    """Hold weights that the command names against a complete column, whose model nothing else would load.

    Raises:
        CacheError: the column was made with others.
    """
    names = []
    for source in plan.sources:
        if source.missing or source.declared is None:
            continue
        location = str(Path(asked.vae).resolve()) if asked.vae and Path(asked.vae).is_dir() else asked.vae
        elsewhere = location is not None and location != source.declared.notes.get("location")
        if model_of(source.source) in asked.weights or (source.source == AUTOENCODER and elsewhere):
            names.append(source.source)
    if names:
        from .loading import load_models

        declared = {source.source: source.declared for source in plan.sources}
        for model in load_models(plan.config, names, "cpu"):
            for name in model.sources:
                ours, here = model.declarations.get(name), declared[name]
                if ours is not None:
                    ensure_source(plan.config.cache, name, ours.provenance, ours.columns)
                elif here is not None and here.weights_sha256 != model.provenance.weights_sha256:
                    # its form was calibrated when it was written: that needs no repetition here
                    raise CacheError(
                        f"cache {plan.config.cache} has {name} from other weights than --weights names",
                        "use those, or choose another folder with --cache",
                    )
