"""Going on from an older checkpoint, and beginning with other weights."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer.run.initial import read_initial
from repa.trainer.run.metrics import read_metrics
from repa.trainer.run.starts import read_starts
from repa.trainer.step.checkpoints import checkpoint_path, checkpoints_of
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]
    Fit = Callable[..., Any]
    SameRun = Callable[[Path, Path, int], None]


def test_going_back_is_the_run_that_went_no_further(
    settings: Settings, run_fit: Fit, tmp_path: Path, same_run: SameRun
) -> None:
    config = settings(max_steps=6, checkpoint_every=2, keep_last=9)
    run_fit(config, "whole")
    run_fit(settings(max_steps=4, checkpoint_every=2, keep_last=9, lr=1e-4))
    run_fit(settings(max_steps=6, checkpoint_every=2, keep_last=9, lr=1e-2))  # a mistake
    run = tmp_path / "run"
    before = (run / "metrics.csv").read_bytes()
    bad = checkpoint_path(run, 6).read_bytes()

    outcome, _ = run_fit(config, from_step=4)
    assert (outcome.resumed_from, outcome.step) == (4, 6)
    same_run(tmp_path / "whole", run, 6)
    start = read_starts(run)[-1]
    assert (start["from_step"], start["first_step"], start["set_aside"]) == (4, 4, "set-aside-2")
    assert [each["key"] for each in start["changed"]] == []
    aside = run / "set-aside-2"
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.csv", "step-00000006.ckpt"]
    assert (aside / "metrics.csv").read_bytes() == before
    assert (aside / "step-00000006.ckpt").read_bytes() == bad


def test_the_same_command_goes_back_once(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=4, checkpoint_every=2, keep_last=9))
    run_fit(settings(max_steps=3, checkpoint_every=1, keep_last=9), from_step=2)
    assert list(checkpoints_of(tmp_path / "run")) == [2, 3]
    outcome, _ = run_fit(settings(max_steps=5, checkpoint_every=1, keep_last=9), from_step=2)
    assert (outcome.resumed_from, outcome.step) == (3, 5)
    # to another step it goes back again
    outcome, _ = run_fit(settings(max_steps=5, checkpoint_every=1, keep_last=9), from_step=4)
    assert outcome.resumed_from == 4


def test_killed_while_going_back(
    settings: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_run: SameRun
) -> None:
    class Killed(BaseException):
        pass

    config = settings(max_steps=5, checkpoint_every=1, keep_last=9)
    run_fit(config, "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    replace, moved = os.replace, []

    def replace_and_die(source: Path, target: Path) -> None:
        if target.parent.name == "set-aside-1" and target.suffix == ".ckpt":
            if moved:
                raise Killed
            moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_and_die)
        with pytest.raises(Killed):
            run_fit(config, from_step=2)
    assert list(checkpoints_of(tmp_path / "run")) == [1, 2, 3, 4]
    outcome, _ = run_fit(config, from_step=2)
    assert outcome.resumed_from == 2
    same_run(tmp_path / "whole", tmp_path / "run", 5)
    assert len(list((tmp_path / "run" / "set-aside-1").glob("*.ckpt"))) == 3


def test_no_checkpoint_of_that_step(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RepaError) as caught:
            run_fit(settings(max_steps=2), from_step=1)
        assert caught.value.field == "--from-step"
        run_fit(settings(max_steps=2))
    assert not list((tmp_path / "run").glob("set-aside*"))


def weights(run: Path, step: int, part: str) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint_path(run, step), weights_only=True)["state_dict"]
    return {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}


def test_a_run_begins_with_the_weights_of_another(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=2, lr=1e-2), "first")
    first = tmp_path / "first"
    # so small a learning rate leaves float32 weights as they are
    config = settings(max_steps=1, lr=1e-30, init=str(first), seed=1)
    run_fit(config, "tuned")
    tuned = tmp_path / "tuned"
    for part in ("backbone.", "method."):
        was, now = weights(first, 2, part), weights(tuned, 1, part)
        assert was.keys() == now.keys()
        assert all(torch.allclose(was[key], now[key], rtol=0, atol=1e-20) for key in was), part
    was, now = weights(first, 2, "ema."), weights(tuned, 1, "ema.")
    assert all(torch.allclose(was[key], now[key], atol=1e-4) for key in was)
    record = read_starts(tuned)[0]["init"]
    assert (record["file"], record["steps"]) == (str(checkpoint_path(first, 2)), 2)
    # a resumed run begins with its own, wherever the others are by now
    shutil.rmtree(first)
    outcome, _ = run_fit(settings(max_steps=2, lr=1e-30, init=str(first), seed=1), "tuned")
    assert outcome.resumed_from == 1
    assert read_starts(tuned)[1]["init"] is None
    with pytest.raises(RepaError) as caught:
        run_fit(settings(max_steps=3, lr=1e-30, init="elsewhere", seed=1), "tuned")
    assert caught.value.field == "init"


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_run_begins_with_published_weights(
    settings: Settings, run_fit: Fit, tmp_path: Path, kind: str
) -> None:
    run_fit(settings(max_steps=2, lr=1e-2), "first")
    raw, averaged = (weights(tmp_path / "first", 2, part) for part in ("backbone.", "ema."))
    file = tmp_path / f"published.{kind}"
    if kind == "pt":
        torch.save({"model": raw, "ema": averaged, "steps": 7}, file)
    else:
        save_file(averaged, file)
    from repa.trainer.run.checks import check

    # its heads are not in the table of published sizes
    with pytest.MonkeyPatch.context() as patch:
        from repa.trainer.models import published
        from repa.trainer.models.sit import SiTSize

        patch.setitem(published.SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=3))
        initial = read_initial(str(file), check(settings()))
    assert all(torch.equal(initial.backbone[key], (raw if kind == "pt" else averaged)[key]) for key in raw)
    assert all(torch.equal(initial.ema[key], averaged[key]) for key in averaged)
    assert initial.record["steps"] == (7 if kind == "pt" else None)


def test_what_no_run_can_begin_with(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=1), "first")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no weights")
    state = torch.load(checkpoint_path(tmp_path / "first", 1), weights_only=True)
    state["state_dict"]["ema.final_layer.linear.bias"] += torch.inf
    torch.save(state, tmp_path / "diverged.ckpt")
    wrong = {
        "missing": {"init": str(tmp_path / "missing")},
        "empty": {"init": str(tmp_path / "empty")},
        "text": {"init": str(tmp_path / "text.pt")},
        "diverged": {"init": str(tmp_path / "diverged.ckpt")},
        "other": {"init": str(tmp_path / "first"), "qk_norm": True},
    }
    for name, changes in wrong.items():
        with pytest.raises(RepaError) as caught:
            run_fit(settings(max_steps=1, **changes), "new")
        assert "\n" not in str(caught.value), name
        assert caught.value.field == "--init", name
        assert not (tmp_path / "new").exists(), name


def test_rows_after_the_step_are_gone(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=4, checkpoint_every=1, keep_last=9))
    run_fit(settings(max_steps=3, checkpoint_every=1, keep_last=9), from_step=2)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.csv")] == [1, 2, 3]
