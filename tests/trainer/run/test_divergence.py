"""Training that diverges: seen before it is saved, and the last good checkpoint stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer.run.divergence import largest, refuse_lost
from repa.trainer.step.checkpoints import checkpoint_path, checkpoints_of
from repa.trainer.step.module import TrainingModule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]
    Fit = Callable[..., Any]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_between_two_rows_is_seen_before_weights_are_saved(
    settings: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    total = TrainingModule._total

    def diverging(self: TrainingModule, terms: Any) -> torch.Tensor:
        loss = total(self, terms)
        if self.global_step == 4:
            self.means.add("loss", torch.tensor(value))
        return loss

    monkeypatch.setattr(TrainingModule, "_total", diverging)
    with pytest.raises(RepaError) as caught:
        run_fit(settings(max_steps=20, log_every=20, checkpoint_every=2, keep_last=1))
    assert caught.value.field == "loss"
    # the one before it stays, although only one is kept
    assert list(checkpoints_of(tmp_path / "run")) == [4]
    assert f"--init {tmp_path / 'run'}" in caught.value.remedy


def test_weights_that_only_the_last_update_spoiled_are_not_saved(
    settings: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All losses up to the checkpoint are finite: the gradient of its last step was not."""
    update, steps = TrainingModule.update_ema, []

    def spoil(self: TrainingModule) -> None:
        update(self)
        steps.append(1)
        if len(steps) == 4:
            with torch.no_grad():
                next(self.backbone.parameters()).view(-1)[0] = torch.nan

    monkeypatch.setattr(TrainingModule, "update_ema", spoil)
    with pytest.raises(RepaError) as caught:
        run_fit(settings(max_steps=4, checkpoint_every=2))
    assert caught.value.field == "weights"
    assert list(checkpoints_of(tmp_path / "run")) == [2]


def test_a_diverged_checkpoint_of_before_is_not_gone_on_from(
    settings: Settings, run_fit: Fit, tmp_path: Path
) -> None:
    run_fit(settings(max_steps=4, checkpoint_every=1, keep_last=9))
    run = tmp_path / "run"
    for step in (3, 4):
        checkpoint = torch.load(checkpoint_path(run, step), weights_only=True)
        checkpoint["state_dict"]["ema.final_layer.linear.bias"][0] = torch.nan
        checkpoint["repa"]["means"]["sums"] = {"loss": torch.nan}
        torch.save(checkpoint, checkpoint_path(run, step))
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(RepaError) as caught:
        run_fit(settings(max_steps=5, clip=0.5))
    assert caught.value.field == "--from-step"
    assert caught.value.remedy.endswith("--from-step 2")
    assert (run / "config.yaml").read_bytes() == before
    outcome, _ = run_fit(settings(max_steps=5, checkpoint_every=1, clip=0.5), from_step=2)
    assert (outcome.resumed_from, outcome.step) == (2, 5)
    refuse_lost(checkpoint_path(run, 5), run)


def test_the_largest_magnitude() -> None:
    assert float(largest([torch.tensor([1.0, -3.0]), torch.tensor([[2.0]])])) == 3.0
    assert torch.isnan(largest([torch.tensor([1.0]), torch.tensor([torch.nan, 2.0])]))
    # a square would overflow, the magnitude does not
    assert float(largest([torch.tensor([3e38])])) == pytest.approx(3e38)
