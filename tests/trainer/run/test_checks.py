"""The checks before step 0: every problem at once, each with its remedy."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.testing import synthetic_cache
from repa.trainer.methods.repa import Repa
from repa.trainer.objectives.times import lognormal_times
from repa.trainer.run.checked import ProblemsError
from repa.trainer.run.checks import check
from repa.trainer.run.phases import describe_phases

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]


def fields_of(config: TrainConfig) -> list[str]:
    """What the problems are about."""
    problems = check(config).problems
    assert all(problem.what and problem.remedy for problem in problems)
    return [problem.field for problem in problems]


def test_a_good_run_has_no_problems(settings: Settings) -> None:
    found = check(settings(holdout=7))
    assert found.problems == []
    assert found.warnings == []
    assert found.train_rows is not None
    assert found.held_out_rows is not None
    assert (len(found.train_rows), len(found.held_out_rows)) == (32, 7)
    assert not set(found.train_rows) & set(found.held_out_rows)
    assert 5 not in found.train_rows
    assert 5 not in found.held_out_rows
    assert found.world_size == 1


def test_all_problems_come_together(settings: Settings) -> None:
    config = settings(batch_size=50, accumulate=3, method__depth=9, method__encoders="demo,dinov2-b")
    found = check(config)
    assert sorted(problem.field for problem in found.problems) == [
        "--batch-size",
        "--batch-size",
        "method.depth",
        "method.encoders",
    ]
    message = str(ProblemsError(found.problems))
    assert "4 problems" in message
    assert message.count("→") == 4
    assert len(ProblemsError(found.problems).lines) == 9
    assert all(problem.remedy for problem in found.problems)


def test_no_cache(settings: Settings, tmp_path: Path) -> None:
    assert fields_of(settings(cache="")) == ["--cache"]
    problems = check(settings(cache=str(tmp_path / "absent"), model="SiT-Q/2")).problems
    assert len(problems) == 2
    assert problems[0].field == "--model"
    assert "repa preprocess" in problems[1].remedy


def test_missing_column_names_the_command(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "latents"
    synthetic_cache(path, num_rows=16, columns={MOMENTS: ColumnSpec(shape=(8, 4, 4), dtype="float32")})
    (problem,) = check(settings(cache=str(path))).problems
    assert problem.field == "method.encoders"
    assert "repa preprocess --encoder" in problem.remedy
    assert fields_of(settings(cache=str(path), method="none")) == []


def test_incomplete_column(settings: Settings, cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    next((copy / "commits" / "demo").glob("*.json")).unlink()
    (problem,) = check(settings(cache=str(copy))).problems
    assert "shards of demo" in problem.what
    assert fields_of(settings(cache=str(copy), method="none")) == []


def test_patch_must_divide_the_latent(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    synthetic_cache(path, num_rows=16, columns={MOMENTS: ColumnSpec(shape=(8, 5, 5), dtype="float32")})
    (problem,) = check(settings(cache=str(path), method="none")).problems
    assert "patch 2 does not divide" in problem.what


def test_grid_of_the_teacher_must_fit(settings: Settings) -> None:
    (problem,) = check(settings(model="SiT-T/1")).problems
    assert problem.field == "demo/patch"
    assert "SiT-T/2" in problem.remedy


def test_latents_must_be_square(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "wide"
    synthetic_cache(path, num_rows=16, columns={MOMENTS: ColumnSpec(shape=(8, 4, 8), dtype="float32")})
    assert fields_of(settings(cache=str(path), method="none")) == [MOMENTS]


def test_random_weights_are_warned_of(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "random"
    synthetic_cache(path, num_rows=16, random_weights=True)
    found = check(settings(cache=str(path)))
    assert found.problems == []
    assert len(found.warnings) == 2
    assert "demo" in found.warnings[1]
    assert "random weights" in found.warnings[1]
    # the teacher is not used
    assert len(check(settings(cache=str(path), method="none")).warnings) == 1


def test_times_that_are_never_drawn_are_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(objective__shift=0.5, objective__times="lognormal")
    assert fields_of(asked) == []
    monkeypatch.setattr(Repa, "time_law", lambda *_: lognormal_times)
    assert fields_of(asked) == ["objective.times", "objective.shift"]
    assert fields_of(settings()) == []


def test_holdout_of_everything(settings: Settings) -> None:
    (problem,) = check(settings(holdout=39)).problems
    assert "cannot be held out" in problem.what


def test_activation_checkpointing_reaches_a_block(settings: Settings) -> None:
    assert fields_of(settings(activation_checkpointing=2)) == []
    assert fields_of(settings(activation_checkpointing=3)) == ["activation_checkpointing"]


def test_precision_of_the_device(settings: Settings) -> None:
    (problem,) = check(settings(precision="16-mixed", trainer__accelerator="cpu")).problems
    assert "16-mixed needs a GPU" in problem.what
    assert "bf16-mixed" in problem.remedy


def test_devices_that_are_not_there(settings: Settings) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (problem,) = check(settings(trainer__accelerator="gpu")).problems
    assert "Lightning refuses" in problem.what


def test_labels_outside_the_classes(
    settings: Settings, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "repa.data.reading.reader.read_labels", lambda path, manifest: np.full(manifest.num_rows, 7, np.int32)
    )
    assert fields_of(settings()) == ["--cache"]


def test_two_devices_divide_the_batch(settings: Settings) -> None:
    config = settings(trainer__devices=2, trainer__accelerator="cpu", batch_size=9)
    assert fields_of(config) == ["--batch-size"]
    assert check(settings(trainer__devices=2, trainer__accelerator="cpu")).world_size == 2


def test_phases_say_what_they_read(settings: Settings) -> None:
    config = settings(max_steps=10)
    (phase,) = describe_phases(check(config), config)
    row = 8 * 4 * 4 * 4 + 4 * 16 * 2
    assert phase["columns"] == (MOMENTS, "demo/patch")
    assert (phase["step_bytes"], phase["all_bytes"]) == (8 * row, 80 * row)
    assert (phase["first"], phase["last"], phase["missing"]) == (0, 9, ())
    json.dumps(phase)
    for accumulate, images in ((1, 8), (4, 2)):
        config = settings(accumulate=accumulate)
        (phase,) = describe_phases(check(config), config)
        assert phase["loader_bytes"] == 4 * images * row


def test_checks_leave_torchs_generator_alone(settings: Settings) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check(settings())
    assert torch.equal(torch.get_rng_state(), before)
