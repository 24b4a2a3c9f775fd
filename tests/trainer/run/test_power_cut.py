"""After a power cut the rows of metrics are as many as the checkpoint that is gone on from counts on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from power_cut import Disk
from repa.trainer.run.metrics import read_metrics
from repa.trainer.step.checkpoints import checkpoints_of, load_checkpoint
from repa.trainer.step.module import TrainingModule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]
    Fit = Callable[..., Any]
    SameRun = Callable[[Path, Path, int], None]

STEPS = 32


def test_32_cuts_leave_32_whole_runs(
    settings: Settings,
    run_fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
    same_run: SameRun,
) -> None:
    config = settings(max_steps=STEPS, log_every=1, checkpoint_every=3, keep_last=2, holdout=7, eval_every=4)
    whole = undisturbed(config)
    run = tmp_path / "run"
    run.mkdir()
    cuts: list[Path] = []
    batch_start = TrainingModule.on_train_batch_start

    def cut(self: TrainingModule, batch: Any, batch_idx: int) -> None:
        """Between two steps, the row of the last one being with the operating system."""
        if batch.step:
            cuts.append(disk.after_a_cut(tmp_path / f"cut{batch.step}"))
        batch_start(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        disk = Disk(run, patch)
        patch.setattr(TrainingModule, "on_train_batch_start", cut)
        run_fit(config)
        cuts.append(disk.after_a_cut(tmp_path / f"cut{STEPS}"))
        disk.close()
    assert len(cuts) == STEPS

    rows = {row["step"]: row for row in read_metrics(whole / "metrics.csv")}
    for step, after in enumerate(cuts, 1):
        newest = max(checkpoints_of(after), default=0)
        assert newest == (step if step == STEPS else step // 3 * 3)
        kept = [row for row in read_metrics(after / "metrics.csv") if row["step"] <= newest]
        # no checkpoint that is there lacks one of its rows
        assert kept == [rows[each] for each in range(1, newest + 1)], step
        if newest:
            state = load_checkpoint(checkpoints_of(after)[newest])["callbacks"]
            assert next(each["rows"] for name, each in state.items() if name.startswith("Metrics")) == newest
    for step in (2, 16, 31):
        run_fit(config, f"cut{step}")
        same_run(whole, tmp_path / f"cut{step}", STEPS)


def test_the_simulation_loses_what_was_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    root = tmp_path / "root"
    root.mkdir()
    disk = Disk(root, monkeypatch)

    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    (root / "a").write_text("one")
    sync(root / "a")
    assert list(disk.after_a_cut(tmp_path / "cut").iterdir()) == []  # its name was not
    sync(root)
    with (root / "a").open("a") as file:
        file.write("two")
    (root / "b").write_text("three")
    assert (disk.after_a_cut(tmp_path / "cut") / "a").read_text() == "one"
    sync(root)
    assert (disk.after_a_cut(tmp_path / "cut") / "b").read_text() == ""
    os.replace(root / "b", root / "a")
    assert (disk.after_a_cut(tmp_path / "cut") / "a").read_text() == "one"
    disk.close()
