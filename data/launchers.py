"""The world that a launcher, torchrun or srun within SLURM, has started this process into.

Both write a cache by several processes and train by several, so what their variables mean is said once.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Mapping

# launcher → variables of rank, number of processes, rank on this machine, number of this machine
# torchrun: https://docs.pytorch.org/docs/stable/elastic/run.html "Environment Variables"
# SLURM: srun(1) "OUTPUT ENVIRONMENT VARIABLES"
_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"),
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID"),
}
# slurm.h: steps from here on are no tasks of srun, but a batch script, an interactive shell and the like
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of one launch, and which of them this one is.

    Attributes:
        launcher: who started them, ``torchrun`` or ``SLURM``.
        rank: number of this process, from 0.
        size: how many there are.
        local_rank: its number on this machine, the GPU it takes.
        local_size: how many there are on this machine.
        node: number of this machine, from 0.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int


def launched_world(environment: Mapping[str, str] | None = None) -> World | None:
    """Return the world that this process is a part of, None if it is alone.

    A batch script of ``sbatch --ntasks=4`` and a shell of salloc have variables of SLURM and are nobody's
    task: only srun starts tasks, each with the number of its step.

    Args:
        environment: variables of the process, by default its own.

    Raises:
        RepaError: a launcher's variables are incomplete or contradict one another.
    """
    found = os.environ if environment is None else environment
    for launcher, names in _VARIABLES.items():
        if names[0] not in found or found.get(names[1], "1") == "1":
            continue
        if launcher == "SLURM" and not _is_task(found):
            continue
        return _world(launcher, names, found)
    return None


def tasks_without_srun(environment: Mapping[str, str] | None = None) -> int:
    """Return how many tasks a batch script has that calls the program without srun, 0 anywhere else."""
    found = os.environ if environment is None else environment
    tasks = found.get("SLURM_NTASKS", "")
    if "SLURM_PROCID" not in found or _is_task(found) or not tasks.isdecimal():
        return 0
    return int(tasks) if int(tasks) > 1 else 0


@dataclass(frozen=True, kw_only=True)
class ArrayTask:
    """One task of a job array of SLURM, a job of its own.

    Attributes:
        index: its number among them, from 0.
        count: how many there are.
    """

    index: int
    count: int


def array_task(environment: Mapping[str, str] | None = None) -> ArrayTask | None:
    """Return which task of a job array this process is of, None if it is of none.

    Its variables are those of sbatch(1), "OUTPUT ENVIRONMENT VARIABLES".

    Args:
        environment: variables of the process, by default its own.

    Raises:
        RepaError: the variables are incomplete, or the numbers of the tasks are not evenly spaced: which of
            them is the first, the second, … cannot be told then.
    """
    found = os.environ if environment is None else environment
    if "SLURM_ARRAY_TASK_ID" not in found:
        return None
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT")]
    try:
        number, least, most, count = (int(found[name]) for name in names)
        step = int(found.get("SLURM_ARRAY_TASK_STEP", "1"))
    except (KeyError, ValueError) as error:
        raise RepaError(
            f"this process is of a job array, but {', '.join(names)} are not all there as numbers ({error})",
            "start it by `sbatch --array`, or unset them",
            field="SLURM_ARRAY_TASK_ID",
        ) from error
    members = range(least, most + 1, step) if step > 0 else range(0)
    if number not in members or most not in members or len(members) != count:
        raise RepaError(
            f"task {number} is of a job array of {count} tasks from {least} to {most}, which are not evenly "
            "spaced",
            "number them without gaps, as `sbatch --array=0-7`; tasks that are done already end at once",
            field="SLURM_ARRAY_TASK_ID",
        )
    return ArrayTask(index=(number - least) // step, count=count)


def _is_task(found: Mapping[str, str]) -> bool:
    step = found.get("SLURM_STEP_ID", found.get("SLURM_STEPID", ""))
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def _world(launcher: str, names: tuple[str, ...], found: Mapping[str, str]) -> World:
    try:
        rank, size, local_rank = (int(found[name]) for name in names[:3])
        node = int(found.get(names[3], "0"))
        local_size = _local_size(launcher, node, size, found)
    except (KeyError, ValueError, IndexError) as error:
        raise RepaError(
            f"{launcher} sets {names[1]}={found.get(names[1])}, but {', '.join(names[:3])} are not all there "
            f"as numbers ({error})",
            f"start every process by {launcher}, or unset them",
            field=names[1],
        ) from error
    if not 0 <= rank < size or not 0 <= local_rank < local_size or node < 0:
        raise RepaError(
            f"{names[0]}={rank}, {names[1]}={size} and {names[2]}={local_rank} of {local_size} on this "
            f"machine do not fit together",
            "unset them, or mend them",
            field=names[0],
        )
    return World(
        launcher=launcher, rank=rank, size=size, local_rank=local_rank, local_size=local_size, node=node
    )


def _local_size(launcher: str, node: int, size: int, found: Mapping[str, str]) -> int:
    """Count the processes that share this machine. They are all of them where nothing says so."""
    if launcher == "torchrun":
        return int(found.get("LOCAL_WORLD_SIZE", size))
    spread = found.get("SLURM_STEP_TASKS_PER_NODE")
    if spread is None:
        # of the allocation, which a step need not fill
        return min(size, int(found.get("SLURM_NTASKS_PER_NODE", size)))
    # "2(x3),1": three machines of two tasks and one of one
    counts: list[int] = []
    for part in spread.split(","):
        match = _TASKS.fullmatch(part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={spread}")
        counts += [int(match[1])] * min(int(match[2] or 1), size)
    return counts[node]
