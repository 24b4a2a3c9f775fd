"""What of the machine each process of a job may take, and which of them have work."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...data.errors import RepaError
from ...data.machine import cores_of_each, usable_cores
from ...data.units import counted

if TYPE_CHECKING:
    from collections.abc import Collection

    from ..config import PreprocessConfig
    from .ranks import Rank

MAX_LANES = 16  # batches at a time in one process; more cores are better used with --devices
MAX_DECODERS = 16
MOST_PROCESSES_A_CORE = 4  # a little more than one each does no harm while they wait for the disk


class DeviceShare(NamedTuple):
    """What one process does and takes.

    Attributes:
        rank: this process, of ``world``: it owns the shards of the job at positions rank, rank + world, …
        world: number of processes.
        device: ``cpu`` or ``cuda:<index>``.
        threads: CPU: batches computed at a time.
        workers: processes that decode.
    """

    rank: int
    world: int
    device: str
    threads: int
    workers: int


def device_shares(
    config: PreprocessConfig, rank: Rank, share: range, missing: Collection[int]
) -> list[DeviceShare]:
    """Return the share of this process, or those of the processes it is to start.

    A process whose shards are all there is not started.

    Args:
        config: the command.
        rank: this process among those of a launcher.
        share: shards of the whole job.
        missing: those of them that are to be written.

    Raises:
        RepaError: more devices than there are, or than the cores can serve; a compute dtype of GPUs without
            one.
    """
    import torch

    from ..encoders.precision import require_arithmetic

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = config.devices if rank.world == 1 else rank.local_world
    _check_devices(config.devices if rank.world == 1 else rank.local_rank + 1, gpus, usable_cores())
    cores = cores_of_each(here, rank.launcher)
    if not gpus:
        # of a GPU each process asks for itself, as asking takes memory of the GPU
        require_arithmetic(config.compute_dtype, torch.device("cpu"))
    workers = config.workers
    if workers is None:
        # on a CPU the loop has time enough to decode while the lanes compute
        workers = min(MAX_DECODERS, cores) if gpus else 0

    def one(number: int, world: int, local: int) -> DeviceShare:
        device = f"cuda:{local}" if gpus else "cpu"
        return DeviceShare(number, world, device, min(MAX_LANES, cores), workers)

    if rank.world > 1:
        return [one(rank.rank, rank.world, rank.local_rank)]
    busy = sorted({place % config.devices for place, shard in enumerate(share) if shard in missing})
    # where nothing is left to do, what it would have cost is still asked
    return [one(number, config.devices, number) for number in busy or [0]]


def _check_devices(processes: int, gpus: int, cores: int) -> None:
    """Refuse processes that would stand in one another's way.

    Raises:
        RepaError: more than there are GPUs, or than the cores can serve where there is none.
    """
    if gpus and processes > gpus:
        raise RepaError(
            f"{counted(processes, 'process')} of this machine, which shows {counted(gpus, 'GPU')}",
            "start fewer",
            field="--devices",
        )
    if not gpus and processes > MOST_PROCESSES_A_CORE * cores:
        raise RepaError(
            f"{counted(processes, 'process')} would share {counted(cores, 'core')}",
            f"start at most as many as there are cores, {cores}",
            field="--devices",
        )
