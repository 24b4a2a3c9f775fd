"""Flags of a Ray pool, and what a worker gets on clusters of several kinds."""

from __future__ import annotations

import pytest
from repa.commands.shared.ray_pool import ray_pool
from repa.data.errors import RepaError
from repa.pipeline.shard_loop.on_ray import RayPool

Flags = tuple[str | None, str | None, float | None, int | None, int]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((None, None, None, None, 4), None),
        (("ray", None, None, None, 1), RayPool()),
        (("ray", "4", None, None, 1), RayPool(least=4, most=4)),
        (("ray", "1:8", 0.5, 6, 1), RayPool(least=1, most=8, gpus=0.5, cpus=6)),
        (("ray", None, 0.0, None, 1), RayPool(gpus=0.0)),
    ],
)
def test_pools(flags: Flags, expected: RayPool) -> None:
    assert ray_pool(*flags) == expected


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("dask", None, None, None, 1), "--launcher"),
        ((None, "4", None, None, 1), "--pool"),
        ((None, None, 0.0, None, 1), "--worker-gpus"),
        ((None, None, None, 1, 1), "--worker-cpus"),
        (("ray", None, None, None, 2), "--devices"),
        (("ray", "0:4", None, None, 1), "--pool"),
        (("ray", "4:2", None, None, 1), "--pool"),
        (("ray", "many", None, None, 1), "--pool"),
        (("ray", None, -1.0, None, 1), "--worker-gpus"),
        (("ray", None, 1.5, None, 1), "--worker-gpus"),
        (("ray", None, float("nan"), None, 1), "--worker-gpus"),
        (("ray", None, None, 0, 1), "--worker-cpus"),
    ],
)
def test_pools_that_cannot_be(flags: Flags, field: str) -> None:
    with pytest.raises(RepaError) as caught:
        ray_pool(*flags)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("pool", "resources", "expected"),
    [
        (RayPool(), {"CPU": 64.0}, (0.0, 1)),
        (RayPool(), {"CPU": 64.0, "GPU": 8.0}, (1.0, 8)),
        (RayPool(), {"CPU": 256.0, "GPU": 8.0}, (1.0, 17)),
        (RayPool(gpus=0.5), {"CPU": 64.0, "GPU": 8.0}, (0.5, 4)),
        (RayPool(gpus=0.0), {"CPU": 64.0, "GPU": 8.0}, (0.0, 1)),
        (RayPool(gpus=1.0), {"CPU": 4.0}, (1.0, 1)),  # the machines with GPUs are yet to join
        (RayPool(cpus=3), {"CPU": 2.0, "GPU": 8.0}, (1.0, 3)),
        (RayPool(), {"CPU": 2.0, "GPU": 4.0}, (1.0, 1)),
    ],
)
def test_what_a_worker_gets(pool: RayPool, resources: dict[str, float], expected: tuple[float, int]) -> None:
    assert pool.on(resources) == expected
