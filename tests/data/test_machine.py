"""What a process may use of a machine, on trees of ``proc`` and ``sys`` with known figures."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from repa.data import machine
from repa.data.machine import (
    allow_open_files,
    available_memory,
    cores_of_each,
    open_files_allowed,
    reading_threads,
    usable_cores,
)

GIB = 2**30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def meminfo(available: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: 999 kB\nMemAvailable:   {available // 1024} kB\n"}


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


@pytest.mark.usefixtures("cores")
def test_cores_are_those_of_the_binding_and_of_every_quota_around(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 16
    second = {
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
        "sys/fs/cgroup/job/cpu.max": "350000 100000\n",
        "sys/fs/cgroup/cpu.max": "900000 100000\n",
    }
    assert usable_cores(tree(tmp_path / "two", second)) == 4
    first = {
        "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n",
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
    }
    assert usable_cores(tree(tmp_path / "one", first)) == 1
    free = {**first, "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1\n"}
    assert usable_cores(tree(tmp_path / "free", free)) == 16


@pytest.mark.usefixtures("cores")
def test_ranks_share_the_cores_unless_slurm_bound_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 16)
    assert [cores_of_each(ranks, None) for ranks in (1, 8, 12, 40)] == [16, 2, 1, 1]
    assert cores_of_each(8, "torchrun") == 2
    assert cores_of_each(8, "SLURM") == 16
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert cores_of_each(8, "SLURM") == 2
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert [reading_threads(None, ranks) for ranks in (1, 4, 8, 9, 16)] == [2, 2, 2, 1, 1]
    assert reading_threads(5, 16) == 5
    assert reading_threads(None) == 2
    for name, value in {"RANK": 0, "WORLD_SIZE": 16, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 16}.items():
        monkeypatch.setenv(name, str(value))
    assert reading_threads(None) == 1


def test_memory_is_what_is_free_and_what_every_group_around_leaves(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert available_memory(tree(tmp_path / "bare", meminfo(64 * GIB))) == 64 * GIB
    second = {
        **meminfo(64 * GIB),
        "proc/self/cgroup": "0::/pod/box\n",
        "sys/fs/cgroup/pod/box/memory.max": "max\n",
        "sys/fs/cgroup/pod/memory.max": f"{10 * GIB}\n",
        "sys/fs/cgroup/pod/memory.current": f"{7 * GIB}\n",
        "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file {2 * GIB}\nslab 9\n",
    }
    # 7 of 10 are taken, and 3 of these are files that can be let go
    assert available_memory(tree(tmp_path / "two", second)) == 6 * GIB
    first = {
        **meminfo(64 * GIB),
        # a path of the host, which the container does not see
        "proc/self/cgroup": "4:memory:/docker/0123\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}\nactive_file 7\n",
    }
    assert available_memory(tree(tmp_path / "one", first)) == 7 * GIB
    unlimited = {**first, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert available_memory(tree(tmp_path / "free", unlimited)) == 64 * GIB


@pytest.mark.parametrize(
    ("soft", "hard", "after"),
    [
        (1024, 4096, 4096),
        (1024, 2**20, 32_768),
        (65_536, 2**20, 65_536),
        (1024, resource.RLIM_INFINITY, 32_768),
    ],
)
def test_the_limit_of_open_files_is_raised_and_never_lowered(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, after: int
) -> None:
    limits = [soft, hard]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: limits.__setitem__(slice(2), values))
    allow_open_files()
    assert (open_files_allowed(), limits[1]) == (after, hard)


def test_a_system_that_refuses_leaves_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: int, values: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    allow_open_files()
    assert open_files_allowed() == 1024
