"""Which share of the shards is this process's: alone, started by torchrun or SLURM, or with ``--devices``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Mapping

# launcher → variables of rank, number of processes, rank on this machine
# torchrun: https://docs.pytorch.org/docs/stable/elastic/run.html "Environment Variables"
# SLURM: srun(1) "OUTPUT ENVIRONMENT VARIABLES"
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
_LOCAL_WORLD = {"torchrun": "LOCAL_WORLD_SIZE", "SLURM": "SLURM_NTASKS_PER_NODE"}


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
    """The rank a launcher gave this process; alone, if none or only one process was started.

    Args:
        environment: variables of the process.
        devices: ``--devices``.

    Raises:
        RepaError: a launcher's variables are incomplete or no numbers, or ``--devices`` is given as well.
    """
    for launcher, names in _LAUNCHERS.items():
        # a shell within an allocation knows the number of tasks, but is none of them
        if names[0] not in environment or environment.get(names[1], "1") == "1":
            continue
        try:
            rank, world, local_rank = (int(environment[name]) for name in names)
            local_world = int(environment.get(_LOCAL_WORLD[launcher], world))
        except (KeyError, ValueError) as error:
            raise RepaError(
                f"{launcher} sets {names[1]}={environment.get(names[1])}, but {', '.join(names)} are not all "
                f"there as numbers ({error})",
                f"start every process by {launcher}, or unset them",
            ) from error
        if not 0 <= rank < world or local_rank < 0 or local_world < 1:
            raise RepaError(
                f"{names[0]}={rank} is not a rank of {names[1]}={world}", "unset them, or mend them"
            )
        if devices != 1:
            raise RepaError(
                f"--devices {devices} within process {rank} of {world} that {launcher} started: "
                f"leave --devices out, {launcher} splits the work already"
            )
        return Rank(rank=rank, world=world, local_rank=local_rank, local_world=local_world, launcher=launcher)
    return Rank()
