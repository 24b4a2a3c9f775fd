"""Conditions by registry: another column than the label conditions training and sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.commands.sample import SampleFlags, sample
from repa.data.errors import RepaError
from repa.trainer.models.conditioning import ConditionColumn, Conditioner, balanced_labels
from repa.trainer.models.conditions import CONDITIONS
from repa.trainer.run.checks import check
from repa.trainer.sampling.generate import model_of_run
from repa.trainer.step.checkpoints import checkpoints_of, load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]


class ClassVector(Conditioner):
    """A teacher's class vector ``[B, D]``, mapped linearly; zeros are the null condition."""

    drop_probability = 0.5

    def __init__(self, column: ConditionColumn) -> None:
        super().__init__()
        self.column = column.column
        self.linear = torch.nn.Linear(column.shape[0], column.width)

    def condition(self, values: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        return torch.where(dropped[:, None].to(values.device), 0.0, values.float())

    def null(self, count: int) -> torch.Tensor:
        return torch.zeros(count, self.linear.in_features, device=self.linear.weight.device)

    def sampling(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(count, self.linear.in_features, generator=generator).to(self.linear.weight.device)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        return self.linear(condition)


class Tokens(ClassVector):
    sequence = True


class Pixels:
    name = "pixels"
    weights_sha256 = "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


@pytest.fixture(autouse=True)
def _one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONDITIONS, "cls", ClassVector)


def test_a_column_conditions_training_and_sampling(
    settings: Settings,
    undisturbed: Callable[..., Path],
    killed_fit: Callable[..., None],
    run_fit: Callable[..., Any],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(condition="demo/cls", checkpoint_every=2, lr=1e-2, holdout=8, eval_every=4)
    whole = undisturbed(config)
    killed_fit(config, "killed", moment=3)
    run_fit(config, "killed")
    same_run(whole, tmp_path / "killed", 4)
    weights = load_checkpoint(checkpoints_of(whole)[4])["state_dict"]
    assert weights["backbone.y_embedder.linear.weight"].shape == (48, 16)

    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    flags = {"run": whole, "num": 3, "steps": 3, "guidance": 1.5, "npz": True}
    sample(SampleFlags(**flags, out=tmp_path / "out"))
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 4, 4, 3)
        assert arrays["arr_1"].shape == (3, 16)
    with pytest.raises(RepaError) as caught:
        sample(SampleFlags(**flags, labels=[1], out=tmp_path / "out"))
    assert caught.value.field == "--label"
    assert isinstance(model_of_run(whole).backbone.y_embedder, ClassVector)


@pytest.mark.parametrize(
    "condition", ["demo/patch", "demo/moments", "other/cls", "nonsense", "", "demo/cls-scale", "demo/.."]
)
def test_columns_that_no_condition_is_made_of(settings: Settings, condition: str) -> None:
    problems = check(settings(condition=condition)).problems
    assert len(problems) == 1
    assert problems[0].remedy


def test_a_sequence_needs_a_backbone_that_takes_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONDITIONS, "cls", Tokens)
    (problem,) = check(settings(condition="demo/cls")).problems
    assert problem.field == "condition"


def test_the_label_is_the_default(settings: Settings) -> None:
    checked = check(settings())
    assert checked.condition == ConditionColumn(column="label", shape=(), num_classes=3, width=48)
    assert checked.condition_columns == ()


def test_balanced_labels() -> None:
    assert balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert balanced_labels(4, 1000).tolist() == [0, 250, 500, 750]


def test_the_dropout_of_labels_is_not_of_other_conditions(settings: Settings) -> None:
    (problem,) = check(settings(condition="demo/cls", label_dropout=0.2)).problems
    assert problem.field == "label_dropout"
    assert not check(settings(label_dropout=0.2)).problems
