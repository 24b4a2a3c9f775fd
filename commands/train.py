"""`repa train`: a cache in, a run folder out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import RepaError
from ..data.places import default_cache
from .live import NO_FLAGS, LiveFlags, live_teachers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from ..pipeline.live import LiveTeachers
    from ..trainer.checks import Checked
    from ..trainer.config import TrainConfig
    from .decoder import Decoder

RUNS = Path("runs")
STOPPED_STATUS = 130


def train(
    *,
    method: str | None = None,
    model: str | None = None,
    cache: Path | str | None = None,
    run: Path | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    targets: str | None = None,
    live: LiveFlags = NO_FLAGS,
    assignments: Sequence[str] = (),
    config: Path | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> None:
    """Train from a cache; the same command resumes from the newest checkpoint.

    What is given here goes before the configuration file, and that before the defaults.

    Args:
        method: name of the method, ``repa``, ``haste`` or ``none``.
        model: name of the backbone, ``SiT-B/2``.
        cache: the cache, or the tars of an export, as ``out/shard-{000000..001251}.tar`` or ``pipe:…``; by
            default that of the run when it is resumed, else the only one under ``caches/``.
        run: folder of the run; by default ``runs/<method>-<model>``.
        max_steps: optimiser steps.
        batch_size: images of a step, over all devices.
        lr: learning rate.
        seed: of initialisation, order and draws.
        targets: ``cache``, or ``online``: call the teachers in every step instead of reading what they said.
        live: the teachers of ``online``; by default those that the run was begun with, else the method's or
            the cache's, on the images that `repa preprocess` would take.
        assignments: further settings, each ``key=value``.
        config: YAML file of settings, for example ``config.yaml`` of another run.
        dry_run: only print the configuration and what would be read.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
        SystemExit: with status 130, after Ctrl-C or SIGTERM ended the run early and it was saved.
    """
    from dataclasses import replace

    from rich.console import Console

    from ..trainer.config import build, load_yaml

    console = console or Console()
    flags = {
        "method": method,
        "model": model,
        "cache": None if cache is None else str(cache),
        "max_steps": max_steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "targets": targets,
    }
    settings = build(None if config is None else load_yaml(config), flags, assignments)
    folder = run or RUNS / settings.default_run_name
    if not settings.cache:
        settings = replace(settings, cache=_cache_of_run(folder) or str(default_cache()))
    teachers = _live(settings, live, folder)
    if dry_run:
        _print_plan(settings, folder, console, teachers)
        return
    from ..trainer.fit import fit

    try:
        outcome = fit(
            settings,
            folder,
            console=console,
            live=teachers,
            decoder=_decoder(settings),
            command=sys.argv,
        )
    finally:
        if teachers is not None:
            teachers.close()
    if not outcome.finished:
        raise SystemExit(STOPPED_STATUS)
    if outcome.trained:
        console.print(
            f"Wrote {folder}; sample from it with `repa sample --run {folder}`.",
            highlight=False,
            soft_wrap=True,
        )


def _live(config: TrainConfig, flags: LiveFlags, folder: Path) -> LiveTeachers | None:
    """The live teachers of an online run.

    Raises:
        RepaError: see `live_teachers`; or flags for them, but the targets come from the cache.
    """
    if config.targets != "online":
        if flags.given:
            raise RepaError(
                f"{', '.join(flags.given)} choose live teachers; add --targets online, or leave them out"
            )
        return None
    from ..trainer.starts import read_starts

    starts = read_starts(folder)
    return live_teachers(config, flags, before=starts[-1].get("live") if starts else None)


def _cache_of_run(folder: Path) -> str | None:
    """The cache that a run was begun with."""
    from ..trainer.config import build, load_yaml
    from ..trainer.fit import CONFIG_FILE

    file = folder / CONFIG_FILE
    return build(load_yaml(file)).cache if file.exists() else None


def _decoder(config: TrainConfig) -> Decoder | None:
    """The autoencoder that made the cache, for previews; None without a cache, which the checks report."""
    import torch

    from ..data.columns import AUTOENCODER
    from ..data.tar_cache import manifest_of
    from .decoder import Decoder

    try:
        provenance = manifest_of(config.cache).sources.get(AUTOENCODER)
    except RepaError:
        return None
    if provenance is None:
        return None
    name = str(provenance.notes.get("location", provenance.model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Decoder(name, device, random_weights=provenance.random_weights)


def _print_plan(
    config: TrainConfig, folder: Path, console: Console, live: LiveTeachers | None = None
) -> None:
    """What ``--dry-run`` prints.

    Raises:
        ProblemsError: after printing, when the run could not start.
    """
    from dataclasses import replace

    from ..trainer.checks import ProblemsError, check, describe_phases
    from ..trainer.loop import resolve_precision

    config = replace(config, precision=resolve_precision(config))
    checked = check(config, live)
    console.print(config.to_yaml(), highlight=False, markup=False, soft_wrap=True, end="")
    console.print()
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
    _print_sizes(checked, config, console)
    _print_phases(describe_phases(checked, config), console)
    for warning in checked.warnings:
        console.print(f"note: {warning}", highlight=False, soft_wrap=True)
    if checked.problems:
        raise ProblemsError(checked.problems)


def _print_sizes(checked: Checked, config: TrainConfig, console: Console) -> None:
    from ..trainer.models.sit import SiT

    if checked.train_rows is not None and checked.held_out_rows is not None:
        images = config.max_steps * config.batch_size
        console.print(
            f"images: {len(checked.train_rows):,} to train on, {len(checked.held_out_rows):,} held out; "
            f"{images:,} seen in {config.max_steps:,} steps, {images / len(checked.train_rows):,.1f} epochs",
            highlight=False,
            soft_wrap=True,
        )
    if checked.backbone is None or checked.method is None:
        return
    import torch

    with torch.device("meta"):
        backbone = sum(each.numel() for each in SiT(checked.backbone).parameters())
    method = sum(each.numel() for each in checked.method.parameters())
    console.print(f"parameters: backbone {backbone:,}, method {method:,}", highlight=False, soft_wrap=True)


def _print_phases(phases: Sequence[Mapping[str, Any]], console: Console) -> None:
    from rich.table import Table

    from ..data.units import human_bytes

    if not phases:
        return
    table = Table()
    for heading in ("phase", "steps", "columns", "missing", "bytes a step", "bytes in all"):
        table.add_column(heading, justify="left" if heading in ("phase", "columns", "missing") else "right")
    for phase in phases:
        table.add_row(
            phase["phase"],
            f"{phase['first']:,}–{phase['last']:,}" if phase["steps"] else "none",
            "\n".join((*phase["columns"], *(f"{name} (live)" for name in phase["live"]))),
            "\n".join(phase["missing"]) or "–",
            human_bytes(phase["step_bytes"]),
            human_bytes(phase["all_bytes"]),
        )
    console.print(table)
