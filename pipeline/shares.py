"""Which shards of a cache are one job's, as ``--shards`` says."""

from __future__ import annotations

import re

from ..data.errors import RepaError
from ..data.launchers import array_task

AUTO_SHARDS = "auto"
_RANGE = re.compile(r"(\d*):(\d*)")


def job_shards(asked: str | None, num_shards: int) -> range:
    """Return the shards that ``--shards`` names, which several processes of the job may share.

    Args:
        asked: ``auto``, every n-th shard for each of the n tasks of a job array of SLURM; ``A:B``, shards A
            to B − 1, where A is 0 and B the number of shards if left out; None takes all.
        num_shards: of the cache.

    Raises:
        RepaError: no such form, no such shards, or ``auto`` outside a job array.
    """
    if asked is None:
        return range(num_shards)
    if asked == AUTO_SHARDS:
        task = array_task()
        if task is None:
            raise RepaError(
                f"--shards {AUTO_SHARDS} asks for the task of a job array, and this process is of none",
                "submit it by `sbatch --array=0-7`, or name shards as --shards 0:100",
                field="--shards",
            )
        return range(task.index, num_shards, task.count)
    match = _RANGE.fullmatch(asked)
    if match is None:
        raise RepaError(
            f"--shards {asked!r} is neither {AUTO_SHARDS} nor a range",
            "give it as 0:100, the end not included",
            field="--shards",
        )
    first, end = int(match[1] or 0), int(match[2] or num_shards)
    if not first < end <= num_shards:
        raise RepaError(
            f"--shards {asked} names no shards of a cache that has {num_shards}",
            f"give a range within 0:{num_shards}, the end not included",
            field="--shards",
        )
    return range(first, end)
