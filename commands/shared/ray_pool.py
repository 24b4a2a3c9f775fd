"""The flags of a Ray pool, ``--launcher``, ``--pool``, ``--worker-gpus`` and ``--worker-cpus``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...data.errors import RepaError

if TYPE_CHECKING:
    from ...pipeline.shard_loop.on_ray import RayPool

RAY = "ray"
_POOL = re.compile(r"(\d+)(?::(\d+))?")
_MOST = 1 << 16


def ray_pool(
    launcher: str | None, pool: str | None, gpus: float | None, cpus: int | None, devices: int
) -> RayPool | None:
    """Return the pool that flags ask for, None where the command does its work itself.

    Args:
        launcher: ``ray`` or None.
        pool: ``4``, or ``1:8``: at least and at most so many workers.
        gpus: of a worker.
        cpus: of a worker.
        devices: ``--devices``.

    Raises:
        RepaError: an unknown launcher, a number out of its range, or flags that contradict one another.
    """
    given = {"--pool": pool, "--worker-gpus": gpus, "--worker-cpus": cpus}
    if launcher is None:
        for flag, value in given.items():
            if value is not None:
                raise RepaError(
                    f"{flag} says what Ray is asked for", f"add --launcher {RAY}, or drop it", field=flag
                )
        return None
    if launcher != RAY:
        raise RepaError(
            f"--launcher {launcher!r} is unknown",
            f"give {RAY}; torchrun and SLURM start the command themselves, and are found by their variables",
            field="--launcher",
        )
    if devices != 1:
        raise RepaError(
            f"--devices {devices} with --launcher {RAY}, which spreads workers over a cluster",
            f"leave it out, and say how many workers with --pool 1:{devices}",
            field="--devices",
        )
    if gpus is not None and not (0 < gpus <= 1 or gpus in range(65)):
        raise RepaError(
            f"--worker-gpus {gpus:g} is no number of GPUs",
            "give 0, a share of one as 0.5, or a whole number up to 64",
            field="--worker-gpus",
        )
    if cpus is not None and not 1 <= cpus <= 1024:
        raise RepaError(f"--worker-cpus {cpus} is out of range", "give 1 to 1,024", field="--worker-cpus")
    from ...pipeline.shard_loop.on_ray import RayPool

    least, most = _workers(pool)
    return RayPool(least=least, most=most, gpus=gpus, cpus=cpus)


def _workers(pool: str | None) -> tuple[int, int | None]:
    if pool is None:
        return 1, None
    match = _POOL.fullmatch(pool)
    least = int(match[1]) if match else 0
    most = int(match[2] or least) if match else 0
    if not 1 <= least <= most <= _MOST:
        raise RepaError(
            f"--pool {pool!r} is no number of workers",
            "give it as 4, or as 1:8, at least one and at most eight",
            field="--pool",
        )
    return least, most
