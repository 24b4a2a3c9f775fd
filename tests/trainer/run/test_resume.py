"""Killed at any moment and started again, a run is the undisturbed one: to the bit on the CPU."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from repa.trainer.run.metrics import MetricsFile
from repa.trainer.step.checkpoints import AtomicCheckpointIO, checkpoints_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig
    from warmed import Warmed

    Settings = Callable[..., TrainConfig]
    Fit = Callable[..., Any]
    SameRun = Callable[[Path, Path, int], None]

KILLED_RUN = """
import io, os, signal, sys
from pathlib import Path
from rich.console import Console
import torch
torch.set_num_threads(1)
from repa.trainer.config import build
from repa.trainer.settings_file import load_yaml
from repa.trainer.run.fit import fit
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.metrics import MetricsFile

SIT_SIZES["T"] = SiTSize(depth=2, width=48, heads=3)
write = MetricsFile.write

def write_and_die(self, step, values):
    write(self, step, values)
    if step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

MetricsFile.write = write_and_die
fit(build(load_yaml(Path(sys.argv[2]))), Path(sys.argv[1]), console=Console(file=io.StringIO()))
"""


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would take seconds to start."""


def test_kill_9_and_the_same_command(
    settings: Settings, run_fit: Fit, tmp_path: Path, same_run: SameRun, warmed: Warmed
) -> None:
    config = settings(max_steps=12, log_every=1, checkpoint_every=4, holdout=7, eval_every=3)
    run_fit(config, "whole")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    killed = tmp_path / "killed"
    script = tmp_path / "killed_run.py"
    script.write_text(KILLED_RUN)
    (result,) = warmed.run(script, killed, file, 6)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert list(checkpoints_of(killed)) == [4]
    assert (killed / "metrics.csv").read_text().count("\n") == 7
    outcome, _ = run_fit(config, "killed")
    assert (outcome.resumed_from, outcome.step) == (4, 12)
    same_run(tmp_path / "whole", killed, 12)


@pytest.mark.parametrize(
    "moment", [1, 3, 4, 5, 9, *(pytest.param(each, marks=pytest.mark.thorough) for each in (2, 6, 7, 8, 10))]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_moment(
    settings: Settings,
    run_fit: Fit,
    tmp_path: Path,
    killed_fit: Callable[..., None],
    undisturbed: Callable[..., Path],
    same_run: SameRun,
    moment: int,
    accumulate: int,
) -> None:
    """Rows are means over two steps, checkpoints come every three: sums are carried over."""
    config = settings(max_steps=10, log_every=2, checkpoint_every=3, accumulate=accumulate)
    killed_fit(config, "killed", moment=moment)
    outcome, _ = run_fit(config, "killed")
    assert outcome.resumed_from == (moment - 1) // 3 * 3
    same_run(undisturbed(config), tmp_path / "killed", 10)


def test_killed_while_writing_a_checkpoint(
    settings: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_run: SameRun
) -> None:
    config = settings(max_steps=6, checkpoint_every=2)
    run_fit(config, "whole")
    save = AtomicCheckpointIO.save_checkpoint

    def save_half(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if "step-00000004" not in str(path):
            save(self, checkpoint, path)
            return
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(b"half of a checkpoint")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", save_half)
        with pytest.raises(Killed):
            run_fit(config, "killed")
    assert list(checkpoints_of(tmp_path / "killed")) == [2]
    run_fit(config, "killed")
    same_run(tmp_path / "whole", tmp_path / "killed", 6)
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_same_command_goes_on(
    settings: Settings,
    run_fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    same_run: SameRun,
    number: int,
) -> None:
    config = settings(max_steps=6, log_every=2, checkpoint_every=100)
    run_fit(config, "whole")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    write = MetricsFile.write

    def write_and_signal(self: MetricsFile, step: int, values: Any) -> None:
        write(self, step, values)
        # once, as timing.csv is written so too, and a second signal does not wait for the step
        if step == 2 and "loss" in values:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", write_and_signal)
        outcome, printed = run_fit(config, "stopped")
    assert not outcome.finished
    assert outcome.step in (2, 3)
    assert "the same command goes on" in printed
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    outcome, _ = run_fit(config, "stopped")
    assert outcome.finished
    same_run(tmp_path / "whole", tmp_path / "stopped", 6)


def test_threads_and_intervals_may_change_on_resume(
    settings: Settings, run_fit: Fit, tmp_path: Path, same_run: SameRun
) -> None:
    run_fit(settings(max_steps=8, checkpoint_every=8), "whole")
    run_fit(settings(max_steps=3, checkpoint_every=3, threads=1), "changed")
    run_fit(settings(max_steps=8, checkpoint_every=5, threads=4), "changed")
    same_run(tmp_path / "whole", tmp_path / "changed", 8)


def test_resume_in_another_epoch(settings: Settings, run_fit: Fit, tmp_path: Path, same_run: SameRun) -> None:
    """39 rows give four batches of eight an epoch; stop in the second, go on into the third."""
    config = settings(max_steps=11, checkpoint_every=6)
    run_fit(config, "whole")
    run_fit(settings(max_steps=6, checkpoint_every=6), "parts")
    run_fit(config, "parts")
    same_run(tmp_path / "whole", tmp_path / "parts", 11)
