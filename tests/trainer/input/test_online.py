"""Targets computed live instead of read: the same runs, the same guarantees, and no teacher after τ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from live_targets import Teacher
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.format.opening import open_manifest
from repa.data.testing import SYNTHETIC_COLUMNS, expected_row, synthetic_cache
from repa.trainer.config import TrainConfig
from repa.trainer.input.datamodule import CacheData
from repa.trainer.input.online import offer
from repa.trainer.run.checks import attention_blocks, check
from repa.trainer.run.metrics import read_metrics
from repa.trainer.run.phases import describe_phases

Settings = Callable[..., TrainConfig]
Fit = Callable[..., Any]
SameRun = Callable[[Path, Path, int], None]

STOP = 6


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cache` without its teacher."""
    path = tmp_path_factory.mktemp("latents") / "cache"
    columns = {MOMENTS: SYNTHETIC_COLUMNS[MOMENTS]}
    synthetic_cache(path, num_rows=40, invalid={5: "damaged"}, columns=columns)
    return path


@pytest.mark.parametrize("accumulate", [1, 2])
def test_repa_from_latents_alone_is_repa_from_the_cache(
    settings: Settings,
    run_fit: Fit,
    same_run: SameRun,
    tmp_path: Path,
    cache: Path,
    latents: Path,
    accumulate: int,
) -> None:
    changes = {"accumulate": accumulate, "holdout": 7, "eval_every": 2}
    run_fit(settings(**changes), "cached")
    teacher = Teacher(cache)
    run_fit(settings(**changes, targets="online", cache=str(latents)), "online", live=teacher)
    same_run(tmp_path / "cached", tmp_path / "online", 4)
    assert teacher.loaded == [torch.device("cpu")]
    assert teacher.names == {("demo/patch",)}
    assert [len(rows) for rows in teacher.asked] == [8 // accumulate] * (4 * accumulate)


@pytest.mark.parametrize("method", ["repa", "reg"])
def test_of_two_views_the_live_teacher_sees_the_one_that_is_read(
    settings: Settings, run_fit: Fit, same_run: SameRun, tmp_path: Path, method: str
) -> None:
    """The latent, and REG's class token, are of that view too, in every sample."""
    cache = tmp_path / "two"
    synthetic_cache(cache, num_rows=40, views=("original", "mirrored"))
    changes = {"holdout": 7, "eval_every": 2, "cache": str(cache), "method": method}
    run_fit(settings(**changes), "cached")
    run_fit(settings(**changes, accumulate=1, targets="online"), "online", live=Teacher(cache))
    same_run(tmp_path / "cached", tmp_path / "online", 4)


def test_haste_calls_no_teacher_from_tau_on(
    haste: Settings, run_fit: Fit, same_run: SameRun, tmp_path: Path, attention_cache: Path
) -> None:
    run_fit(haste(), "cached")
    teacher = Teacher(attention_cache)
    run_fit(haste(targets="online"), "online", live=teacher)
    same_run(tmp_path / "cached", tmp_path / "online", 10)
    assert len(teacher.asked) == STOP
    # what is read ahead across τ is not prepared either, and every batch is prepared before it is asked for
    assert teacher.prepared == teacher.asked
    rows = read_metrics(tmp_path / "online" / "metrics.csv")
    assert ["attention" in row for row in rows] == [True] * STOP + [False] * (10 - STOP)


@pytest.mark.parametrize("moment", [2, 5, STOP, STOP + 1, 9])
def test_killed_and_resumed_it_is_the_undisturbed_run(
    haste: Settings,
    run_fit: Fit,
    killed_fit: Callable[..., None],
    undisturbed: Callable[..., Path],
    same_run: SameRun,
    tmp_path: Path,
    attention_cache: Path,
    moment: int,
) -> None:
    config = haste(targets="online", checkpoint_every=3, log_every=2)
    resumed = Teacher(attention_cache)
    killed_fit(config, "killed", moment=moment, live=Teacher(attention_cache))
    outcome, _ = run_fit(config, "killed", live=resumed)
    assert outcome.resumed_from == (moment - 1) // 3 * 3
    same_run(undisturbed(config, live=Teacher(attention_cache)), tmp_path / "killed", 10)
    assert len(resumed.asked) == max(STOP - outcome.resumed_from, 0)


def test_each_rank_asks_for_its_slice(settings: Settings, cache: Path) -> None:
    config = settings(targets="online")
    slices = []
    for world in (1, 2):
        for rank in range(world):
            teacher = Teacher(cache)
            checked = check(config, teacher)
            assert checked.reader is not None
            assert checked.train_rows is not None
            data = CacheData(
                config, checked.reader, checked.train_rows, lambda _: (MOMENTS, "demo/patch"), teacher
            )
            strategy = SimpleNamespace(root_device=torch.device("cpu"))
            data.trainer = SimpleNamespace(  # type: ignore[assignment]
                global_rank=rank, world_size=world, num_devices=world, strategy=strategy, global_step=0
            )
            batch = next(data.train_dataloader())
            assert set(batch.columns) == {MOMENTS}
            moved = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
            data.teardown("fit")
            expected = np.stack(
                [
                    expected_row("demo/patch", row, checked.reader.manifest.columns["demo/patch"])
                    for row in batch.rows.tolist()
                ]
            )
            assert np.array_equal(moved.columns["demo/patch"].numpy(), expected.astype(np.float32))
            assert teacher.asked == [batch.rows.tolist()] == teacher.prepared
            slices.append(teacher.asked[0])
    assert slices[0] == slices[1] + slices[2]


def test_other_targets_are_another_run(settings: Settings, run_fit: Fit, cache: Path) -> None:
    run_fit(settings(max_steps=1))
    with pytest.raises(RepaError, match=r"targets \(cache → online\).*--run"):
        run_fit(settings(max_steps=2, targets="online"), live=Teacher(cache))
    run_fit(settings(max_steps=1, targets="online"), "online", live=Teacher(cache))
    with pytest.raises(RepaError, match=r"targets \(online → cache\)"):
        run_fit(settings(max_steps=2), "online")


def test_another_teacher_is_another_run(settings: Settings, run_fit: Fit, cache: Path, latents: Path) -> None:
    config = settings(max_steps=1, targets="online", cache=str(latents))
    run_fit(config, live=Teacher(cache))
    other = Teacher(cache)
    other.sources = {name: replace(each, weights_sha256="0" * 64) for name, each in other.sources.items()}
    with pytest.raises(CacheError, match=r"the live teacher is not the one .*\(demo changed\).*--run"):
        run_fit(replace(config, max_steps=2), live=other)
    outcome, _ = run_fit(replace(config, max_steps=2), live=Teacher(cache))
    assert outcome.resumed_from == 1


def test_random_weights_are_said(settings: Settings, run_fit: Fit, cache: Path) -> None:
    teacher = Teacher(cache)
    teacher.sources = {name: replace(each, random_weights=True) for name, each in teacher.sources.items()}
    _, printed = run_fit(settings(max_steps=1, targets="online"), live=teacher)
    assert "the live teacher demo has random weights" in printed


def test_what_cannot_be_online(settings: Settings, cache: Path) -> None:
    def problems(config: TrainConfig, live: Any) -> str:
        return "\n".join(each.what for each in check(config, live).problems)

    assert "no live teacher" in problems(settings(targets="online"), None)
    none = settings(method="none", targets="online")
    assert problems(none, Teacher(cache)) == "method none takes nothing from a teacher"
    # and read from the cache, a teacher is not looked at
    assert check(settings(), Teacher(cache)).live is None


def test_an_offer_has_no_targets_of_the_cache(attention_cache: Path, cache: Path) -> None:
    manifest, live = open_manifest(attention_cache), Teacher(cache)
    assert offer(manifest).columns == manifest.columns
    online = offer(manifest, live)
    assert online.columns == {
        MOMENTS: SYNTHETIC_COLUMNS[MOMENTS],
        "demo/cls": SYNTHETIC_COLUMNS["demo/cls"],
        "demo/patch": ColumnSpec(shape=(4, 16), dtype="float32"),
    }
    assert online.grids["demo"] == (2, 2)


def test_blocks_and_plan(haste: Settings, settings: Settings, attention_cache: Path) -> None:
    assert attention_blocks(settings()) == ()
    assert attention_blocks(haste()) == (1, 3)
    config = haste(targets="online")
    align, plain = describe_phases(check(config, Teacher(attention_cache)), config)
    assert (align["columns"], align["live"]) == ((MOMENTS,), ("demo/patch", "demo/q", "demo/k"))
    assert (plain["columns"], plain["live"]) == ((MOMENTS,), ())
    assert align["step_bytes"] == plain["step_bytes"] == 8 * SYNTHETIC_COLUMNS[MOMENTS].row_bytes
    assert align["missing"] == ()
