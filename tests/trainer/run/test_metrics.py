"""Means that do not depend on when they are fetched; a file that a resumed run continues byte for byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from repa.trainer.run.metrics import MetricsFile, first_not_finite, read_metrics
from repa.trainer.step.means import Means

if TYPE_CHECKING:
    from pathlib import Path


def test_means_by_hand() -> None:
    means = Means()
    for value in (1.0, 2.0, 6.0):
        means.add("loss", torch.tensor(value))
        means.add("weight", 0.5)
    assert means.take() == {"loss": 3.0, "weight": 0.5}
    assert means.take() == {}


def test_means_do_not_depend_on_when_they_are_fetched() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    at_once, in_parts = Means(), Means()
    for index, value in enumerate(values):
        at_once.add("loss", value)
        in_parts.add("loss", value)
        if index % 7 == 0:
            in_parts.fetch()
            resumed = Means()
            resumed.load_state_dict(in_parts.state_dict())
            in_parts = resumed
    assert at_once.take() == in_parts.take()


def test_means_keep_the_order_of_first_appearance() -> None:
    means = Means()
    means.add("b", torch.tensor(1.0))
    means.add("a", 1.0)
    assert list(means.take()) == ["b", "a"]


def test_means_over_ranks() -> None:
    means = Means()
    means.add("loss", torch.tensor(1.0))
    assert means.take(lambda vector: vector + 2) == {"loss": 3.0}


def undisturbed(path: Path, last: int) -> MetricsFile:
    file = MetricsFile(path, resumed_step=0)
    for step in range(1, last + 1):
        write(file, step)
    return file


def write(file: MetricsFile, step: int) -> None:
    values = {"loss": step / 3}
    if step % 3 == 0:
        values["held_out"] = 1 / step
    if step >= 5:
        values["late"] = float(step)
    file.write(step, values)


@pytest.mark.parametrize("saved", [0, 1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("cut", [0, 5])
def test_a_resumed_file_is_the_undisturbed_one(tmp_path: Path, saved: int, cut: int) -> None:
    whole, killed = tmp_path / "whole.csv", tmp_path / "killed.csv"
    undisturbed(whole, 9)
    undisturbed(killed, 7)
    data = killed.read_bytes()
    if saved < 7:
        # the kill may have come in the middle of a line
        killed.write_bytes(data[: len(data) - cut])
    resumed = MetricsFile(killed, resumed_step=saved)
    for step in range(saved + 1, 10):
        write(resumed, step)
    assert killed.read_bytes() == whole.read_bytes()


def test_reading_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    undisturbed(path, 5)
    rows = read_metrics(path)
    assert rows[2] == {"step": 3.0, "loss": 1.0, "held_out": pytest.approx(1 / 3)}
    assert list(rows[4]) == ["step", "loss", "late"]


def test_first_not_finite() -> None:
    assert first_not_finite({"a": 1.0}) is None
    assert first_not_finite({"a": 1.0, "b": float("nan"), "c": float("inf")}) == "b"
