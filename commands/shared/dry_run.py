"""What `repa train` prints of a run without training it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.units import counted, human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from ...pipeline.replay.live import LiveTeachers
    from ...trainer.config import TrainConfig
    from ...trainer.methods.base import Problem
    from ...trainer.run.checked import Checked
    from ...trainer.settings_list import Setting


def print_plan(config: TrainConfig, folder: Path, console: Console, live: LiveTeachers | None = None) -> None:
    """Print what ``--dry-run`` shows.

    Args:
        config: of the run.
        folder: of the run.
        console: where to print.
        live: teachers that are called in every step; None reads the cache.

    Raises:
        ProblemsError: after printing, when the run could not start.
        RepaError: after printing, when another run's first steps are not this one's.
    """
    from ...trainer.run.arithmetic import describe, resolved
    from ...trainer.run.checks import check
    from ...trainer.run.first_steps import read_first_steps
    from ...trainer.run.identity import identity_of
    from ...trainer.run.phases import describe_phases
    from ...trainer.step.checkpoints import checkpoints_of

    arithmetic, config = describe(config), resolved(config)
    checked = check(config, live)
    console.print(config.to_yaml(), highlight=False, markup=False, soft_wrap=True, end="")
    console.print()
    say(console, f"run folder: {folder}")
    say(console, f"arithmetic: {arithmetic}")
    _print_sizes(checked, config, console)
    _print_phases(describe_phases(checked, config), checked.threads, console)
    say_findings(checked.warnings, checked.problems, console)
    # what live teachers are is not known before they are loaded
    if checked.live is None and not checkpoints_of(folder):
        read_first_steps(checked, config, identity_of(checked, config))


def print_settings(console: Console) -> None:
    """Print what ``--help-settings`` shows.

    Args:
        console: where to print.
    """
    from ...trainer.settings_list import list_settings

    print_entries(list_settings(), "config.yaml", console)


def print_entries(settings: Iterable[Setting], file: str, console: Console) -> None:
    """Print settings, each section but the first under its name.

    Args:
        settings: in the order of their sections.
        file: whose settings they are.
        console: where to print.
    """
    section = None
    for each in settings:
        if each.section != section:
            say(console, f"settings of {file}" if section is None else f"\n{each.section}")
            section = each.section
        default = f", default {each.default}" if each.default else ""
        say(console, f"  {each.key} ({each.type}{default})")
        say(console, f"      {each.help}")


def say_findings(warnings: Sequence[str], problems: list[Problem], console: Console) -> None:
    """Print what the checks warn of.

    Args:
        warnings: in order.
        problems: why the run could not start.
        console: where to print.

    Raises:
        ProblemsError: after printing, when the run could not start.
    """
    from ...trainer.run.checked import ProblemsError

    for warning in warnings:
        say(console, f"note: {warning}")
    if problems:
        raise ProblemsError(problems)


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_sizes(checked: Checked, config: TrainConfig, console: Console) -> None:
    from ...trainer.models.conditions import build_conditioner
    from ...trainer.models.registry import build, choices_of
    from ...trainer.objectives.registry import make_objective, name_of
    from ...trainer.run.sharded_strategy import NAME as FSDP

    if checked.train_rows is not None and checked.held_out_rows is not None:
        images = config.max_steps * config.batch_size
        say(
            console,
            f"images: {len(checked.train_rows):,} to train on, {len(checked.held_out_rows):,} held out; "
            f"{images:,} seen in {counted(config.max_steps, 'step', ',')}, "
            f"{images / len(checked.train_rows):,.1f} epochs",
        )
    if checked.backbone is None or checked.method is None:
        return
    import torch

    with torch.device("meta"):
        conditioner = None if checked.condition is None else build_conditioner(checked.condition)
        if checked.backbone.takes_sequences and (conditioner is None or not conditioner.sequence):
            return  # the problems say so
        network = build(checked.backbone, conditioner)
        backbone = sum(each.numel() for each in network.parameters())
        trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    method = sum(each.numel() for each in checked.method.parameters())
    say(console, f"parameters: backbone {backbone:,}, method {method:,}")
    parts = checked.world_size if config.trainer.get("strategy") == FSDP and checked.world_size else 1
    # weight, gradient and two moments of what trains, and one average of the backbone, in float32
    held = 4 * (4 * (trained + method) + backbone) / parts
    say(
        console,
        f"memory of weights: {human_bytes(held)} a device, with gradients, moments and averaged weights",
    )
    objective = make_objective(config.objective)
    say(
        console,
        f"objective: {name_of(config.objective)} ({' + '.join(objective.terms)}), the network predicts "
        f"{objective.predicts}; sampled by {' or '.join(objective.solvers)}",
    )
    if choices := choices_of(checked.backbone):
        said = ", ".join(f"{name} {'on' if value else 'off'}" for name, value in choices.items())
        say(console, f"{config.model}: {said}")
    if (every := config.activation_checkpointing) != "off":
        depth = checked.backbone.facts.depth
        say(
            console,
            f"activation checkpointing: {depth // every} of {counted(depth, 'block')} computed again in the "
            "backward pass",
        )


def _print_phases(phases: Sequence[Mapping[str, Any]], threads: int | None, console: Console) -> None:
    from rich.table import Table

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
    if most := max(phase["loader_bytes"] for phase in phases):
        by = f" by {counted(threads, 'thread')}" if threads else ""
        say(
            console,
            f"memory of the loader: {human_bytes(most)} a device, for the micro-batch trained on, the next "
            f"and those being read{by}",
        )
