"""`repa softrepa train` makes a run folder with soft tokens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ...data.units import counted, human_bytes
from ...pipeline.images.names import default_cache
from ..shared.dry_run import print_entries, say, say_findings
from ..train import STOPPED_STATUS

if TYPE_CHECKING:
    from rich.console import Console

    from ...trainer.softrepa.checks import SoftChecked
    from ...trainer.softrepa.settings import SoftConfig
    from .train_flags import SoftTrainFlags


def train(flags: SoftTrainFlags, *, console: Console | None = None) -> None:
    """Train soft tokens from a cache. The same command resumes from the newest checkpoint.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
        SystemExit: with status 130, after a signal or ``max_time`` ended the run and it was saved.
    """
    from ...trainer.softrepa.fit import BEST_FILE, TOKENS_FILE, fit, refuse_folder
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    if flags.help_settings:
        _print_settings(console)
        return
    refuse_folder(flags.run)
    config = _settings(flags)
    if flags.dry_run:
        _print_plan(config, flags, console)
        return
    outcome = fit(config, flags.run, console=console, command=sys.argv)
    if not outcome.finished:
        raise SystemExit(STOPPED_STATUS)
    if outcome.trained:
        best = flags.run / BEST_FILE
        file = best if best.exists() else flags.run / TOKENS_FILE
        say(console, f"Wrote {file}; sample with it with `repa softrepa sample --run {flags.run}`.")


def _settings(flags: SoftTrainFlags) -> SoftConfig:
    """Collect the settings of flags, file and run.

    Raises:
        RepaError: an unknown setting, or a value of another type.
    """
    from dataclasses import replace

    from ...trainer.settings_file import load_yaml
    from ...trainer.softrepa.settings import build
    from ...trainer.step.checkpoints import SOFTREPA_FILE

    own = flags.run / SOFTREPA_FILE
    file = flags.config or (own if own.exists() else None)
    base = None if file is None else load_yaml(file)
    names = ("model", "cache", "max_steps", "batch_size", "lr", "seed")
    config = build(base, {name: getattr(flags, name) for name in names}, flags.assignments or ())
    return config if config.cache else replace(config, cache=str(default_cache()))


def _print_plan(config: SoftConfig, flags: SoftTrainFlags, console: Console) -> None:
    """Print what ``--dry-run`` shows.

    Raises:
        ProblemsError: after printing, when the run could not start.
    """
    from ...trainer.softrepa.checks import check

    checked = check(config)
    console.print((checked.config or config).to_yaml(), highlight=False, soft_wrap=True)
    say(console, f"run folder: {flags.run}")
    _print_sizes(checked, console)
    say_findings(checked.warnings, checked.problems, console)


def _print_sizes(checked: SoftChecked, console: Console) -> None:
    from ...data.format.columns import MOMENTS
    from ...trainer.softrepa.tokens import numbers_of

    config, facts = checked.config, checked.facts
    if config is None or facts is None or checked.shape is None:
        return
    numbers = numbers_of(checked.shape, time_table=bool(config.time_table))
    pairs, at_once = config.batch_size**2, min(config.rows, config.batch_size) * config.batch_size
    where = f"in {', '.join(config.blocks or ())}" if facts.is_unet else f"in {config.layers} blocks"
    say(
        console,
        f"{facts.name} is {facts.kind}: {counted(config.tokens or 0, 'token')} {where}, {numbers:,} numbers "
        f"are trained; {pairs:,} predictions a step, {at_once:,} at a time",
    )
    if checked.train_rows is None or checked.held_out_rows is None or checked.text is None:
        return
    assert checked.manifest is not None, "rows were found in it"
    columns = (MOMENTS, *checked.text.names)
    row = sum(checked.manifest.columns[name].row_bytes for name in columns)
    images = config.max_steps * config.batch_size
    say(
        console,
        f"images: {len(checked.train_rows):,} to train on, {len(checked.held_out_rows):,} held out; "
        f"{images:,} seen in {counted(config.max_steps, 'step', ',')}; {', '.join(columns)}: "
        f"{human_bytes(row * config.batch_size)} a step",
    )


def _print_settings(console: Console) -> None:
    """Print what ``--help-settings`` shows."""
    from ...trainer.settings_list import settings_of
    from ...trainer.softrepa.settings import PRESETS, SoftConfig

    print_entries(settings_of(SoftConfig, "softrepa", ""), "softrepa.yaml", console)
    for kind, preset in PRESETS.items():
        values = " ".join(f"{key}={_written(value)}" for key, value in preset.items())
        say(console, f"of {kind}, where nothing is set: {values}")


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
