"""What of this machine is a process's to use, in cores, memory and open files."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .launchers import launched_world

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_READING_THREADS = 2
"""Threads that read for a process unless it is told otherwise: more gained nothing where it was measured."""

_ROOT = Path("/")
# twice what a reader holds at most, and as much again for everything else
_ENOUGH_FILES = 32_768


def usable_cores(root: Path = _ROOT) -> int:
    """Count the cores this process may use, by its binding and by the quota of its control groups.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    bound = _bound_cores()
    quotas = [quota for folder in _groups(root, "cpu") if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([bound, *(int(-(-quota // 1)) for quota in quotas)]))


def cores_of_each(processes: int, launcher: str | None) -> int:
    """Count the cores for each of so many processes of this machine, this one being one of them.

    They share what this one may use, but for tasks of SLURM that are bound, each to cores of its own.

    Args:
        processes: of this machine.
        launcher: who started them.
    """
    own = launcher == "SLURM" and _bound_cores() < (os.cpu_count() or 1)
    return usable_cores() if own else max(1, usable_cores() // processes)


def reading_threads(threads: int | None, processes: int | None = None) -> int:
    """Return how many threads read for a rank, as asked, or two, or one where ranks have a core or less each.

    Args:
        threads: as asked; None leaves it open.
        processes: ranks of this machine; by default as many as a launcher started.
    """
    if threads is not None:
        return threads
    world = launched_world()
    if processes is None:
        processes = 1 if world is None else world.local_size
    cores = cores_of_each(processes, None if world is None else world.launcher)
    return max(1, min(MOST_READING_THREADS, cores))


def available_memory(root: Path = _ROOT) -> int | None:
    """Return the bytes of memory that are free or can be freed, for this process and its page cache.

    The page cache counts to the control group whose process read the file first, so a container's limit is
    one on what it keeps. None where nothing says how much there is.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        rooms = [room for folder in _groups(root, "memory") if (room := _memory_room(folder)) is not None]
        return max(0, min([1024 * int(line.split()[1]), *rooms]))
    return None


def allow_open_files() -> None:
    """Raise how many files this process may open, as far as it may by itself.

    A thousand, where many systems begin, are fewer than the shards of a large cache.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # some systems have a limit beside the hard one
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_files_allowed() -> int:
    """Return how many files this process may open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _ENOUGH_FILES if soft == resource.RLIM_INFINITY else soft


def _bound_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """List the folders of this process's control groups, its own first and then those around it.

    Source: cgroups(7). In a container the path may be one of the host's, which is not there: then the
    container's own group is what the mount itself shows.
    """
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                mount = root / "sys/fs/cgroup"
            elif controller in controllers.split(","):
                mount = root / "sys/fs/cgroup" / controller
            else:
                continue
            folder = mount / path.lstrip("/")
            for each in (folder, *folder.parents):
                if each.is_dir():
                    yield each
                if each == mount:
                    break


def _cpu_quota(folder: Path) -> float | None:
    """Return the cores' worth of time that a group gets, None where it is not limited."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def _memory_room(folder: Path) -> int | None:
    """Return the bytes that a group may still take, its page cache being given up for it.

    None where it is not limited.
    """
    for limit, usage, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        with suppress(OSError, ValueError):
            most = (folder / limit).read_text().strip()
            if most == "max":
                return None
            lines = (folder / "memory.stat").read_text().splitlines()
            values = {name: int(value) for name, value in (line.split() for line in lines)}
            files = sum(values.get(f"{prefix}{state}_file", 0) for state in ("active", "inactive"))
            return int(most) - int((folder / usage).read_text()) + files
    return None
