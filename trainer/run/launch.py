"""The processes of a run, which are those that torchrun or srun has started, or Lightning's own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from ...data.errors import RepaError
from ...data.launchers import launched_world

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.launchers import World

_OF_LAUNCHER = ("devices", "num_nodes")
_FIRST_PORT, _PORTS = 15_000, 10_000


def is_leader() -> bool:
    """Return whether this process is rank 0 of the run, as torchrun, SLURM and Lightning's launcher tell it.

    Raises:
        RepaError: a launcher's variables contradict one another.
    """
    world = launched_world()
    if world is not None:
        return world.rank == 0
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "GROUP_RANK", "LOCAL_RANK"))


class LaunchedEnvironment(ClusterEnvironment):
    """What Lightning must know of the processes that torchrun or srun has started.

    Lightning's own environments take a batch script for a task, want ``--ntasks-per-node`` by name, and
    save checkpoints of another kind on a signal within SLURM.

    Args:
        world: of this process.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    @property
    def creates_processes_externally(self) -> bool:
        """Say that nothing is left to start."""
        return True

    @property
    def main_address(self) -> str:
        """The machine of rank 0."""
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        default = SLURMEnvironment.resolve_root_node_address(nodes)
        # what a user has set goes before what SLURM's list of machines says
        return os.environ.get("MASTER_ADDR") or default or "127.0.0.1"

    @property
    def main_port(self) -> int:
        """The port of rank 0, the same in every process of a job and another in another job."""
        # from the job's number, so that two jobs that share a machine do not meet
        job = "".join(each for each in os.environ.get("SLURM_JOB_ID", "0") if each.isdecimal())
        return int(os.environ.get("MASTER_PORT") or _FIRST_PORT + int(job or 0) % _PORTS)

    @staticmethod
    def detect() -> bool:
        """Say whether there is such a world."""
        return launched_world() is not None

    def world_size(self) -> int:
        """Count the processes."""
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """Leave it as the launcher said."""

    def global_rank(self) -> int:
        """Return the number of this process."""
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """Leave it as the launcher said."""

    def local_rank(self) -> int:
        """Return the number of this process on its machine."""
        return self._world.local_rank

    def node_rank(self) -> int:
        """Return the number of this machine."""
        return self._world.node


def launched_devices(settings: Mapping[str, Any], world: World | None) -> dict[str, Any]:
    """Return the devices of each machine and the machines, the launcher's, or as set, or one.

    Raises:
        RepaError: settings that contradict the launcher, or machines with unequal numbers of processes.
    """
    if world is None:
        return {"devices": 1, **{name: settings[name] for name in _OF_LAUNCHER if name in settings}}
    if world.size % world.local_size:
        raise RepaError(
            f"{world.launcher} started {world.size} processes, {world.local_size} of them on this machine, "
            "and training needs as many on every machine",
            "start equally many, as srun --ntasks-per-node does",
            field="trainer.devices",
        )
    launched = {"devices": world.local_size, "num_nodes": world.size // world.local_size}
    for name, here in launched.items():
        asked = settings.get(name, here)
        count = len(asked) if isinstance(asked, (list, tuple)) else asked
        if count not in (here, str(here), "auto", -1, "-1"):
            raise RepaError(
                f"trainer.{name}={asked}, but {world.launcher} started {world.local_size} of {world.size} "
                "processes on this machine",
                f"leave trainer.{name} out, or start as many",
                field=f"trainer.{name}",
            )
    return launched


def environments(world: World | None) -> list[ClusterEnvironment]:
    """Choose the environment to use. None lets Lightning look for LSF and MPI."""
    if world is not None:
        return [LaunchedEnvironment(world)]
    # named, as Lightning would take a batch script, or a shell within an allocation, for task 0 of several
    return [LightningEnvironment()] if "SLURM_JOB_ID" in os.environ else []
