"""The share of the shards that is this process's, alone, under torchrun or SLURM, or with ``--devices``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.launchers import launched_world

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process among those that write a cache.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its number on this machine: the GPU it takes.
        local_world: how many there are on this machine: they share its cores.
        launcher: who started them, or None when it is alone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str | None = None


def detect_rank(environment: Mapping[str, str], devices: int) -> Rank:
    """Return the rank a launcher gave this process, that of one alone if none started several.

    Args:
        environment: variables of the process.
        devices: ``--devices``.

    Raises:
        RepaError: a launcher's variables are incomplete or no numbers, or ``--devices`` is given as well.
    """
    world = launched_world(environment)
    if world is None:
        return Rank()
    if devices != 1:
        raise RepaError(
            f"--devices {devices} within process {world.rank} of {world.size} that {world.launcher} started",
            f"leave --devices out, {world.launcher} splits the work already",
            field="--devices",
        )
    return Rank(
        rank=world.rank,
        world=world.size,
        local_rank=world.local_rank,
        local_world=world.local_size,
        launcher=world.launcher,
    )
