"""What a resumed run does with other settings: the weights say so, and the record."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from repa.data.errors import RepaError
from repa.trainer import resuming
from repa.trainer.config import build
from repa.trainer.methods.base import Step
from repa.trainer.run.metrics import read_metrics
from repa.trainer.run.starts import read_starts
from repa.trainer.sampling.generate import model_of_run
from repa.trainer.settings_file import load_yaml
from repa.trainer.step.checkpoints import checkpoints_of
from repa.trainer.step.schedule import learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., Any]
    Fit = Callable[..., tuple[Any, str]]


def state(run: Path, step: int) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(checkpoints_of(run)[step], weights_only=True)
    return loaded


def largest_change(run: Path, before: int, after: int) -> float:
    one, two = (state(run, step)["state_dict"] for step in (before, after))
    return max(float((one[key] - two[key]).abs().max()) for key in one if key.startswith("backbone."))


NONE = {"method": "none", "checkpoint_every": 2, "keep_last": 9}


def test_an_edited_learning_rate_is_used_and_recorded(
    settings: Settings, run_fit: Fit, tmp_path: Path
) -> None:
    run_fit(settings(**NONE, max_steps=4))
    run = tmp_path / "run"
    before = (run / "metrics.csv").read_bytes()
    # AdamW moves a weight by about lr in a step, whatever the gradient
    assert largest_change(run, 2, 4) > 1e-5
    place = run / "config.yaml"
    values = {**yaml.safe_load(place.read_text()), "lr": 1e-8, "max_steps": 6}
    place.write_text(yaml.safe_dump(values))
    run_fit(build(load_yaml(place)))
    assert 0 < largest_change(run, 4, 6) < 1e-7
    assert state(run, 6)["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-8
    assert (run / "metrics.csv").read_bytes().startswith(before)
    start = read_starts(run)[-1]
    assert start["first_step"] == 4
    assert start["changed"] == [{"key": "lr", "before": 1e-4, "now": 1e-8}]
    assert read_starts(run)[0]["changed"] == []


def test_what_the_optimiser_is_told_beside_the_learning_rate(
    settings: Settings, run_fit: Fit, tmp_path: Path
) -> None:
    run_fit(settings(**NONE, max_steps=2))
    run_fit(settings(**NONE, max_steps=4, weight_decay=0.5, betas="0.8,0.95", clip="none"))
    group = state(tmp_path / "run", 4)["optimizer_states"][0]["param_groups"][0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.5, (0.8, 0.95))
    changed = read_starts(tmp_path / "run")[-1]["changed"]
    assert [each["key"] for each in changed] == ["betas", "weight_decay", "clip"]


def test_the_name_of_a_preset_may_change_and_no_setting_of_it() -> None:
    def sra(*assignments: str) -> TrainConfig:
        return build({"method": {"name": "sra"}}, {}, assignments)

    unnamed = sra().to_dict()
    assert resuming.changes(unnamed, sra("method.preset=paper")) == []
    assert resuming.changes(sra("method.preset=paper").to_dict(), sra()) == []
    with pytest.raises(RepaError) as caught:
        resuming.changes(unnamed, sra("method.preset=channel"))
    assert caught.value.field == "method.weight"


def test_an_edit_of_what_the_run_is_bound_to_is_refused(
    settings: Settings, run_fit: Fit, tmp_path: Path
) -> None:
    run_fit(settings(**NONE, max_steps=2))
    place = tmp_path / "run" / "config.yaml"
    values = {**yaml.safe_load(place.read_text()), "seed": 7, "max_steps": 4}
    place.write_text(yaml.safe_dump(values))
    with pytest.raises(RepaError) as caught:
        run_fit(build(load_yaml(place)))
    assert caught.value.field == "seed"
    assert yaml.safe_load(place.read_text())["seed"] == 7  # an edit is the user's to take back


def test_a_checkpoint_of_before_settings_were_kept(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(**NONE, max_steps=2))
    run = tmp_path / "run"
    checkpoint = state(run, 2)
    del checkpoint["repa"]["settings"]
    torch.save(checkpoint, checkpoints_of(run)[2])
    place = run / "config.yaml"
    values = {**yaml.safe_load(place.read_text()), "lr": 1e-8, "max_steps": 4}
    for key in ("lr_warmup", "lr_schedule", "label_dropout", "latent_scale", "latent_shift"):
        del values[key]
    place.write_text(yaml.safe_dump(values))
    run_fit(build(load_yaml(place)))
    assert [each["key"] for each in read_starts(run)[-1]["changed"]] == ["lr"]
    assert 0 < largest_change(run, 2, 4) < 1e-7


def test_schedules_are_functions_of_the_step() -> None:
    constant = build(assignments=["lr=0.5", "max_steps=10"])
    assert {learning_rate(constant, step) for step in range(12)} == {0.5}
    linear = build(assignments=["lr=1", "max_steps=12", "lr_warmup=2", "lr_schedule=linear"])
    assert [learning_rate(linear, step) for step in (0, 1, 2, 7, 11, 12)] == pytest.approx(
        [0.5, 1, 1, 0.5, 0.1, 0]
    )
    cosine = build(assignments=["lr=1", "max_steps=12", "lr_warmup=2", "lr_schedule=cosine"])
    assert [learning_rate(cosine, step) for step in (0, 1, 2, 7, 12)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert learning_rate(cosine, 4) == pytest.approx((1 + math.cos(0.2 * math.pi)) / 2)
    longer = build(assignments=["lr=1", "max_steps=3", "lr_warmup=9"])
    assert [learning_rate(longer, step) for step in (0, 2)] == pytest.approx([1 / 9, 1 / 3])


def test_a_schedule_is_a_column_and_resumes_to_the_bit(
    settings: Settings,
    run_fit: Fit,
    killed_fit: Callable[..., None],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
) -> None:
    config = settings(**NONE, max_steps=6, lr_warmup=2, lr_schedule="cosine")
    run_fit(config, "whole")
    killed_fit(config, "killed", moment=5)
    run_fit(config, "killed")
    same_run(tmp_path / "whole", tmp_path / "killed", 6)
    rates = [row["lr"] for row in read_metrics(tmp_path / "whole" / "metrics.csv")]
    assert rates == pytest.approx([learning_rate(config, step) for step in range(6)])
    run_fit(settings(**NONE, max_steps=2), "constant")
    assert "lr" not in read_metrics(tmp_path / "constant" / "metrics.csv")[0]


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, set()), (1.0, {3})])
def test_labels_are_dropped_as_often_as_the_setting_says(
    settings: Settings,
    run_fit: Fit,
    monkeypatch: pytest.MonkeyPatch,
    dropout: float,
    expected: set[int],
) -> None:
    from repa.trainer.models.conditioning import LabelConditioner

    seen: set[int] = set()
    forward = LabelConditioner.forward

    def watch(self: LabelConditioner, condition: torch.Tensor) -> torch.Tensor:
        seen.update(condition.tolist())
        return forward(self, condition)

    monkeypatch.setattr(LabelConditioner, "forward", watch)
    run_fit(settings(method="none", max_steps=2, label_dropout=dropout))
    assert seen
    assert (seen & {3}) == expected  # of three classes, the fourth is the null one
    assert dropout == 0 or seen == {3}


def test_the_record_is_json(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(**NONE, max_steps=2))
    run_fit(settings(**NONE, max_steps=4, clip="none"))
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert starts[1]["changed"] == [{"key": "clip", "before": 1.0, "now": None}]


def test_the_scale_of_latents_is_a_setting_that_a_checkpoint_keeps(
    settings: Settings, run_fit: Fit, tmp_path: Path
) -> None:
    run_fit(settings(**NONE, max_steps=2, latent_scale=0.5, latent_shift=0.25))
    saved = state(tmp_path / "run", 2)["repa"]["latent"]
    assert (saved["scaling_factor"], saved["shift_factor"]) == (0.5, 0.25)
    assert model_of_run(tmp_path / "run").scale == (0.5, 0.25, (), ())
    with pytest.raises(RepaError) as caught:
        run_fit(settings(**NONE, max_steps=4, latent_scale=0.75, latent_shift=0.25))
    assert caught.value.field == "latent_scale"


def test_a_network_learns_what_the_scale_makes_of_latents(
    settings: Settings, run_fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}
    for name, changes in (("own", {}), ("half", {"latent_scale": 0.18215 / 2})):
        monkeypatch.setattr(
            "repa.trainer.step.module.Step",
            lambda name=name, **values: (seen.setdefault(name, values["x0"]), Step(**values))[1],
        )
        run_fit(settings(**NONE, max_steps=1, **changes), name)
    torch.testing.assert_close(seen["half"], seen["own"] / 2)


@pytest.mark.parametrize(("before", "now"), [(False, "off"), (True, "whole")])
def test_compile_of_before_there_was_a_choice(
    settings: Callable[..., TrainConfig], before: bool, now: str
) -> None:
    values = settings(compile=now).to_dict() | {"compile": before}
    del values["matmul_precision"]
    assert resuming.changes(values, settings(compile=now)) == []
    (changed,) = resuming.changes(values, settings(compile="blocks"))
    assert (changed.key, changed.before, changed.now) == ("compile", now, "blocks")
