"""Shards of a job: every one is of exactly one task of an array, however the tasks are numbered."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.data.launchers import ArrayTask, array_task
from repa.pipeline.shares import job_shards


def variables(number: int, least: int, most: int, count: int, step: int | None = None) -> dict[str, str]:
    """What SLURM sets in a task of an array."""
    values = {"ID": number, "MIN": least, "MAX": most, "COUNT": count}
    if step is not None:
        values["STEP"] = step
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@given(
    least=st.integers(0, 9),
    step=st.integers(1, 5),
    count=st.integers(1, 12),
    num_shards=st.integers(1, 40),
    processes=st.integers(1, 4),
)
def test_tasks_share_all_shards(least: int, step: int, count: int, num_shards: int, processes: int) -> None:
    most = least + step * (count - 1)
    taken: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for number in range(least, most + 1, step):
            for name, value in variables(number, least, most, count, step).items():
                patch.setenv(name, value)
            share = job_shards("auto", num_shards)
            for rank in range(processes):
                taken += share[rank::processes]
    assert sorted(taken) == list(range(num_shards))


def test_no_task_outside_an_array() -> None:
    assert array_task({}) is None
    assert array_task(variables(5, 3, 9, 4, 2)) == ArrayTask(index=1, count=4)
    assert array_task(variables(5, 0, 7, 8)) == ArrayTask(index=5, count=8)


@pytest.mark.parametrize(
    "found",
    [
        {"SLURM_ARRAY_TASK_ID": "3"},
        {**variables(3, 0, 7, 8), "SLURM_ARRAY_TASK_COUNT": "many"},
        variables(3, 1, 7, 3),  # --array=1,3,7
        variables(4, 0, 6, 3, 3),  # not one of 0, 3, 6
        variables(0, 0, 7, 4, 2),  # ends at 6
        variables(0, 0, 7, 8, 0),
        variables(8, 0, 7, 8),
    ],
)
def test_arrays_with_gaps(found: dict[str, str]) -> None:
    with pytest.raises(RepaError) as caught:
        array_task(found)
    assert caught.value.field == "SLURM_ARRAY_TASK_ID"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, range(10)), ("2:5", range(2, 5)), (":3", range(3)), ("7:", range(7, 10)), (":", range(10))],
)
def test_ranges(asked: str | None, expected: range) -> None:
    assert job_shards(asked, 10) == expected


@pytest.mark.parametrize("asked", ["auto", "", "3", "5:5", "5:2", "10:11", "0:11", "-1:3", "a:b", "0:4:2"])
def test_ranges_that_name_nothing(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(RepaError) as caught:
        job_shards(asked, 10)
    assert caught.value.field == "--shards"
