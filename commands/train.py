"""`repa train` makes a run folder from a cache."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.errors import RepaError
from ..pipeline.images.names import default_cache
from .shared.dry_run import print_plan, print_settings, say
from .shared.flags import local_folder
from .shared.live import LiveData, LiveEncoders, LiveRandom, LiveWeights, flags_given, live_teachers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from ..pipeline.replay.live import LiveTeachers
    from ..trainer.config import TrainConfig

RUNS = Path("runs")
STOPPED_STATUS = 130


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """The flags of `repa train`. What is None is as in the configuration file, or the default."""

    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Begin with a published setting, of those that `repa recipes` lists; --config, the other "
            "flags and --set go before it.",
        ),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            help="'none' for plain SiT, 'repa', 'haste', 'irepa', 'reg', 'urepa', 'sra', 'sra2', 'erw', "
            "'gmem', one that an installed package offers, or my_module:MyMethod.",
            show_default="repa",
        ),
    ] = None
    model: Annotated[
        str | None, typer.Option(help="Backbone.", show_default="SiT-B/2, or the method's own")
    ] = None
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="CACHE",
            help="Folder of the cache, its address in a bucket, s3://… or gs://…, or tars of an export; "
            "default: the only one under caches/.",
        ),
    ] = None
    run: Annotated[
        Path | None,
        typer.Option(
            # torchrun takes --run for a short form of its own --run-path, wherever it stands
            "--run",
            "--run-folder",
            parser=local_folder,
            metavar="<path>",
            help="Folder of the run: a new or empty one, or that of the run to go on with. "
            "Write --run-folder behind torchrun.",
            show_default="runs/<method>-<model>, or runs/<recipe>",
        ),
    ] = None
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps.", show_default="400000")] = None
    batch_size: Annotated[
        int | None, typer.Option(help="Images of a step, over all devices.", show_default="256")
    ] = None
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="1e-4")] = None
    seed: Annotated[
        int | None, typer.Option(help="Of initialisation, order and draws.", show_default="0")
    ] = None
    init: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|FILE",
            help="Begin a new run with the weights of another, or of a published checkpoint: to fine-tune, "
            "or to go on with another precision.",
        ),
    ] = None
    from_step: Annotated[
        int | None,
        typer.Option(
            metavar="STEP",
            help="Go back to this checkpoint of the run; newer ones are set aside in its folder. Once: the "
            "same command again goes on from the newest.",
        ),
    ] = None
    targets: Annotated[
        str | None,
        typer.Option(
            help="'cache', or 'online': call the teachers in every step, the reference.", show_default="cache"
        ),
    ] = None
    data: LiveData = None
    encoders: LiveEncoders = None
    weights: LiveWeights = None
    random_weights: LiveRandom = False
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any other setting, see --help-settings; may repeat."
        ),
    ] = None
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings, as config.yaml of another run.")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False
    help_settings: Annotated[
        bool, typer.Option("--help-settings", help="Print every setting with type and default, and stop.")
    ] = False


_SETTINGS = ("method", "model", "cache", "max_steps", "batch_size", "lr", "seed", "targets", "init")
"""Flags that are settings of `TrainConfig`."""


def train(flags: TrainFlags, *, console: Console | None = None) -> None:
    """Train from a cache. The same command resumes from the newest checkpoint.

    What the flags say goes before the configuration file, that before the recipe, and that before the
    defaults. A run that is resumed keeps its recipe, its cache and, if it is ``online``, its teachers.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
        SystemExit: with status 130, after a signal or ``trainer.max_time`` ended the run and it was saved.
    """
    from ..trainer.run.folder import refuse_foreign_folder
    from .shared.terminal import PlainConsole

    console = console or PlainConsole()
    if flags.help_settings:
        print_settings(console)
        return
    settings, folder = _settings(flags)
    refuse_foreign_folder(folder)
    if not settings.cache:
        settings = replace(settings, cache=_cache_of_run(folder) or str(default_cache()))
    teachers = _live(settings, flags, folder)
    _say_recipe(settings, console)
    if flags.dry_run:
        print_plan(settings, folder, console, teachers)
        return
    from ..trainer.run.fit import fit
    from .shared.watching import decoder_of_run, evaluator_of_run

    try:
        outcome = fit(
            settings,
            folder,
            console=console,
            live=teachers,
            decoder=decoder_of_run(settings, flags.weights or ()),
            evaluator=evaluator_of_run(settings, flags.weights or ()),
            command=sys.argv,
            from_step=flags.from_step,
        )
    finally:
        if teachers is not None:
            teachers.close()
    if not outcome.leader:
        return  # with another status than 0, Lightning would kill the leader before it is done
    if not outcome.finished:
        raise SystemExit(STOPPED_STATUS)
    if outcome.trained:
        then = (
            f"sample from it with `repa sample --run {folder}`"
            if outcome.predicts
            else "it has been warmed up alone, and predicts nothing yet: go on with a larger --max-steps"
        )
        say(console, f"Wrote {folder}; {then}.")


def _live(config: TrainConfig, flags: TrainFlags, folder: Path) -> LiveTeachers | None:
    """Make the live teachers of an online run.

    Raises:
        RepaError: see `live_teachers`; or flags for them, but the targets come from the cache.
    """
    if config.targets != "online":
        # evaluations have encoders of their own
        of_evaluations = ("--weights",) if config.evaluate_every or config.decoder else ()
        if needless := [flag for flag in flags_given(flags) if flag not in of_evaluations]:
            raise RepaError(
                f"{', '.join(needless)} choose live teachers",
                "add --targets online, or leave them out",
                field=needless[0],
            )
        return None
    from ..trainer.run.starts import read_starts

    starts = read_starts(folder)
    return live_teachers(config, flags, before=starts[-1].get("live") if starts else None)


def _settings(flags: TrainFlags) -> tuple[TrainConfig, Path]:
    """Collect the settings that the flags ask for, and choose the folder of the run.

    A run that is there already goes on with its own configuration, where the flags name no other.

    Raises:
        RepaError: an unknown setting, or a value of another type.
    """
    from ..trainer.config import build
    from ..trainer.run.folder import CONFIG_FILE
    from ..trainer.settings_file import load_yaml

    given = {name: getattr(flags, name) for name in _SETTINGS}
    assignments = flags.assignments or ()
    base = _with_recipe(flags.recipe, None if flags.config is None else load_yaml(flags.config))
    folder = flags.run or RUNS / build(base, given, assignments).default_run_name
    own = folder / CONFIG_FILE
    if flags.config is None and own.exists():
        base = load_yaml(own)
        if flags.recipe is not None:
            # of another recipe than the run's the folder says that it is none of this run
            base = {**base, "recipe": flags.recipe}
    return build(base, given, assignments), folder


def _with_recipe(asked: str | None, file: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the values of the recipe that the flag names, or the file, under those of the file.

    Raises:
        RepaError: the recipe is unknown.
    """
    name = (file or {}).get("recipe") if asked is None else asked
    if not name:
        return file
    from ..recipes.applied import with_recipe

    return with_recipe(str(name), file)


def _say_recipe(config: TrainConfig, console: Console) -> None:
    """Print which recipe the settings began with, and in what they differ from it."""
    if not config.recipe:
        return
    from ..recipes import RECIPES
    from ..recipes.applied import changed
    from ..trainer.run.launch import is_leader

    if config.recipe not in RECIPES or not is_leader():
        return  # a run of a version that had it, or one of several processes
    recipe = RECIPES[config.recipe]
    differing = "; ".join(f"{key} {before} → {now}" for key, (before, now) in changed(config).items())
    say(
        console,
        f"recipe: {recipe.name}, {recipe.reproduces} (arXiv {recipe.paper})"
        + (f"; changed: {differing}" if differing else ""),
    )


def _cache_of_run(folder: Path) -> str | None:
    """Find the cache that a run was begun with."""
    from ..trainer.config import build
    from ..trainer.run.folder import CONFIG_FILE
    from ..trainer.settings_file import load_yaml

    file = folder / CONFIG_FILE
    return build(load_yaml(file)).cache if file.exists() else None
