"""Runs of ERW: its two phases as one run, as two launches and on another run's warm-up, to the bit."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from repa.commands.sample import SampleFlags, sample
from repa.commands.train import TrainFlags, train
from repa.data.errors import RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from repa.trainer.methods.erw import WARMUP
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checked import ProblemsError
from repa.trainer.run.checks import check
from repa.trainer.run.first_steps import read_first_steps
from repa.trainer.run.identity import identity_of
from repa.trainer.run.metrics import read_metrics
from repa.trainer.run.phases import describe_phases
from repa.trainer.step.checkpoints import checkpoints_of
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]

W, STEPS = 3, 6


@pytest.fixture
def erw(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """`settings` of ERW with one of three blocks warmed up in three steps of six."""
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=3, width=24, heads=2))

    def make(**changes: Any) -> TrainConfig:
        values = {
            "method": "erw",
            "method__warmup_steps": W,
            "method__warmup_depth": 1,
            "method__depth": 2,
            "method__projector_width": 8,
            "method__half_life": 32,
            "max_steps": STEPS,
            "lr": 1e-2,
        }
        return settings(**{**values, **changes})

    return make


def state_of(run: Path, step: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(checkpoints_of(run)[step], weights_only=True)
    return state


def same_state(first: Path, second: Path, step: int) -> None:
    """Weights, averaged weights and the optimiser's moments."""
    one, two = state_of(first, step), state_of(second, step)
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    moments = [each["optimizer_states"][0]["state"] for each in (one, two)]
    assert moments[0].keys() == moments[1].keys()
    for number, values in moments[0].items():
        assert all(torch.equal(value, moments[1][number][key]) for key, value in values.items())
    assert one["CacheData"] == two["CacheData"]


def rows_of(run: Path) -> list[dict[str, float]]:
    return read_metrics(run / "metrics.csv")


def test_without_warmup_and_with_a_constant_weight_it_is_repa(
    settings: Settings, run_fit: Callable[..., Any], same_run: Callable[..., None], tmp_path: Path
) -> None:
    constant = {"method__warmup_steps": 0, "method__half_life": "none", "method__projector_width": 16}
    run_fit(settings(method="erw", method__depth=1, **constant), "erw")
    run_fit(settings(), "repa")
    same_run(tmp_path / "erw", tmp_path / "repa", 4)


def test_one_launch_is_two(
    erw: Settings, undisturbed: Callable[..., Path], run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    """Two launches in one folder, and a run that takes the warm-up of another."""
    whole = undisturbed(erw())
    run_fit(erw(max_steps=W), "run")
    run_fit(erw(), "run")
    same_state(whole, tmp_path / "run", STEPS)
    assert rows_of(tmp_path / "run") == rows_of(whole)
    run_fit(erw(max_steps=W), "first")
    _, said = run_fit(erw(method__warmup_from=str(tmp_path / "first")), "second")
    assert "begins at step 3" in said
    same_state(whole, tmp_path / "second", STEPS)
    assert rows_of(tmp_path / "second") == rows_of(whole)[W:]
    (start,) = json.loads((tmp_path / "second" / "run.json").read_text())["starts"]
    assert start["first_step"] == W
    assert start["first_steps"]["steps"] == W
    assert start["first_steps"]["file"].endswith(f"step-{W:08d}.ckpt")
    assert {"max_steps", "method.warmup_from"} == {*start["first_steps"]["differs"]}


def test_a_run_on_anothers_warmup_is_killed_and_resumed(
    erw: Settings,
    undisturbed: Callable[..., Path],
    run_fit: Callable[..., Any],
    killed_fit: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Before its first checkpoint, and after it, where the other run is no longer looked at."""
    whole = undisturbed(erw(checkpoint_every=1, keep_last=9))
    first = tmp_path / "first"
    run_fit(erw(max_steps=W), "first")
    config = erw(
        checkpoint_every=1, keep_last=9, method__warmup_from=str(first / "checkpoints" / f"step-{W:08d}.ckpt")
    )
    killed_fit(config, "run", moment=1)
    killed_fit(config, "run", moment=2)
    (first / "checkpoints" / f"step-{W:08d}.ckpt").unlink()
    outcome, _ = run_fit(config)
    assert outcome.resumed_from == W + 1
    same_state(whole, tmp_path / "run", STEPS)
    assert rows_of(tmp_path / "run") == rows_of(whole)[W:]


def test_what_the_warmup_leaves_alone(erw: Settings, run_fit: Callable[..., Any], tmp_path: Path) -> None:
    """Neither moved nor decayed, where the others are; the averaged weights begin at W as a hard copy."""
    config = erw(weight_decay=0.5, ema_decay=0.75, max_steps=W + 1, checkpoint_every=1, keep_last=9)
    checked = check(config)
    module, _ = assemble(config, checked, identity_of(checked, config))
    start = {key: value.clone() for key, value in module.state_dict().items()}
    idle = {id(each) for each in module.idle_parameters(module.method.phase_at(0))}
    left = {name for name, value in module.named_parameters() if id(value) in idle}
    assert left == {
        key
        for key in start
        if key.startswith(("backbone.blocks.1.", "backbone.blocks.2.", "backbone.final_layer."))
    }
    run_fit(config)
    warm, after = (state_of(tmp_path / "run", step) for step in (W, W + 1))
    moved = {key for key in left if not torch.equal(warm["state_dict"][key], start[key])}
    assert moved == set()
    assert len(warm["optimizer_states"][0]["state"]) == sum(
        parameter.requires_grad for parameter in module.parameters()
    ) - len(left)
    key = "blocks.0.mlp.fc1.weight"
    weights = [each["state_dict"][f"backbone.{key}"] for each in (warm, after)]
    assert not torch.equal(weights[0], start[f"backbone.{key}"])
    assert not torch.equal(warm["state_dict"][f"ema.{key}"], weights[0])
    torch.testing.assert_close(after["state_dict"][f"ema.{key}"], 0.75 * weights[0] + 0.25 * weights[1])
    steps = {float(values["step"]) for values in after["optimizer_states"][0]["state"].values()}
    assert steps == {1.0}


def test_the_warmup_has_nothing_to_show_for_itself(
    erw: Settings, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    """No held-out loss and no previews until a prediction is trained, and that is said once."""

    class Decoder:
        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            return latent[:, :3].clamp(0, 1).to(torch.uint8)

    every = {"holdout": 8, "eval_every": 1, "preview_every": 1, "preview_count": 1, "preview_steps": 1}
    config = erw(**every, max_steps=W + 1, keep_last=9)
    _, said = run_fit(config, decoder=Decoder())
    assert said.count(f"until step {W}") == 1
    assert [step for step, row in enumerate(rows_of(tmp_path / "run"), 1) if "held_out" in row] == [W + 1]
    assert [file.name for file in (tmp_path / "run" / "samples").iterdir()] == [f"step-{W + 1:08d}.png"]
    warm = checkpoints_of(tmp_path / "run")[W]
    with pytest.raises(RepaError) as caught:
        sample(SampleFlags(checkpoint=warm, num=1, out=tmp_path / "out"))
    assert caught.value.field == "--ckpt"
    assert not (tmp_path / "out").exists()
    outcome, said = run_fit(erw(max_steps=W), "short")
    assert "until its end" in said
    assert not outcome.predicts
    assert run_fit(erw(), "short")[0].predicts


def test_the_checkpoint_of_the_hand_over_stays(
    erw: Settings, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    run_fit(erw(checkpoint_every=2, keep_last=1, keep_every=0))
    assert [*checkpoints_of(tmp_path / "run")] == [W, STEPS]


def test_phases_of_a_run_on_anothers_warmup(erw: Settings) -> None:
    config = erw(method__warmup_from="elsewhere")
    checked = check(config)
    assert (checked.problems, checked.warnings) == (
        [],
        check(erw(method__warmup_steps=0, method__warmup_depth="none")).warnings,
    )
    warmup, full = describe_phases(checked, config)
    assert (warmup["phase"], warmup["steps"], warmup["all_bytes"]) == (WARMUP, 0, 0)
    assert (full["first"], full["last"], full["steps"]) == (W, STEPS - 1, STEPS - W)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"init": "somewhere"}, "init"), ({"max_steps": W}, "--max-steps")],
)
def test_what_contradicts_it_is_refused(erw: Settings, changes: dict[str, Any], field: str) -> None:
    (problem,) = check(erw(method__warmup_from="elsewhere", **changes)).problems
    assert problem.field == field


def test_a_warmup_that_is_taken_needs_steps(erw: Settings) -> None:
    (problem,) = check(
        erw(method__warmup_from="elsewhere", method__warmup_steps=0, method__warmup_depth="none")
    ).problems
    assert problem.field == "method.warmup_from"
    assert problem.remedy.startswith("leave it out,")


@pytest.fixture
def first(erw: Settings, undisturbed: Callable[..., Path]) -> Path:
    """A run that ends with its warm-up."""
    return undisturbed(erw(max_steps=W))


def taken(config: TrainConfig) -> Any:
    checked = check(config)
    assert checked.problems == []
    return read_first_steps(checked, config, identity_of(checked, config))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 5},
        {"lr": 1e-4, "batch_size": 4},
        {"method__weight": 2.0, "method__depth": 3, "method__half_life": "none"},
        {"order": "blocks"},
        {"method__encoders": "demo"},
    ],
)
def test_what_may_differ_is_noted(erw: Settings, first: Path, changes: dict[str, Any]) -> None:
    found = taken(erw(method__warmup_from=str(first), **changes))
    assert found.step == W
    assert {key.replace("__", ".") for key in changes} <= found.record["differs"].keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method__warmup_depth": 2, "method__depth": 3}, "method.warmup_depth"),
        ({"method__warmup_weight": 0.25}, "method.warmup_weight"),
        ({"method__projector_width": 12}, "method.projector_width"),
        ({"method__relations": 3}, "method.relations"),
        ({"qk_norm": True}, "backbone.qk_norm"),
        ({"model": "SiT-T/1"}, "backbone.patch_size"),
        ({"latent_scale": 1.0}, "latent"),
        ({"holdout": 8}, "holdout"),
    ],
)
def test_what_differs_is_named(erw: Settings, first: Path, changes: dict[str, Any], named: str) -> None:
    config = erw(method__warmup_from=str(first), **changes)
    checked = check(config)
    with pytest.raises(RepaError) as caught:
        read_first_steps(checked, config, identity_of(checked, config))
    assert caught.value.field == "method.warmup_from"
    assert f"{named} (" in caught.value.what or f": {named}" in caught.value.what
    assert "\n" not in str(caught.value)


def test_another_cache_or_teacher_is_named(erw: Settings, first: Path, tmp_path: Path) -> None:
    columns = {**SYNTHETIC_COLUMNS, "other/patch": ColumnSpec(shape=(4, 12), dtype="float16")}
    for rows, teacher, named in ((40, "other", "cache (demo)"), (48, "demo", "cache (keys)")):
        folder = tmp_path / str(rows)
        synthetic_cache(folder, num_rows=rows, invalid={5: "damaged"}, columns=columns)
        with pytest.raises(RepaError) as caught:
            taken(erw(cache=str(folder), method__warmup_from=str(first), method__encoders=teacher))
        assert named in caught.value.what


def test_runs_that_have_no_such_steps(
    erw: Settings, settings: Settings, first: Path, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    """None at all, another step, another method, or a warm-up that was over before."""
    run_fit(settings(method__depth=1, max_steps=W, checkpoint_every=W), "repa")
    run_fit(erw(method__warmup_steps=1, max_steps=W), "short")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_bytes(b"nothing")
    for run in (tmp_path / "absent", empty, tmp_path / "file", tmp_path / "repa", tmp_path / "short"):
        with pytest.raises(RepaError) as caught:
            taken(erw(method__warmup_from=str(run)))
        assert caught.value.field == "method.warmup_from"
        assert caught.value.remedy
    with pytest.raises(RepaError) as caught:
        taken(erw(method__warmup_from=str(tmp_path / "file")))
    assert "delete" not in caught.value.remedy  # it is not this run's
    with pytest.raises(RepaError) as caught:
        taken(erw(method__warmup_steps=2, method__warmup_from=str(first)))
    assert str(W) in caught.value.remedy
    with pytest.raises(RepaError):
        taken(erw(method__warmup_steps=2, method__warmup_from=str(checkpoints_of(first)[W])))


def test_a_shorter_warmup_is_the_first_part_of_a_longer(
    erw: Settings, undisturbed: Callable[..., Path], run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    short = undisturbed(erw(method__warmup_steps=2))
    run_fit(erw(max_steps=W, checkpoint_every=1, keep_last=9), "first")
    run_fit(erw(method__warmup_steps=2, method__warmup_from=str(tmp_path / "first")), "second")
    same_state(short, tmp_path / "second", STEPS)


def test_nothing_is_made_of_a_run_whose_first_steps_cannot_be_had(
    erw: Settings, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RepaError):
        run_fit(erw(method__warmup_from=str(tmp_path / "absent")))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ProblemsError):
        run_fit(erw(method__warmup_depth=2))


def test_a_dry_run_looks_at_the_other_run(erw: Settings, first: Path, tmp_path: Path) -> None:
    def plan(**changes: Any) -> str:
        config = erw(method__warmup_from=str(first), **changes)
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        printed = io.StringIO()
        flags = TrainFlags(config=tmp_path / "config.yaml", run=tmp_path / "run", dry_run=True)
        train(flags, console=Console(file=printed, width=200))
        return printed.getvalue()

    assert f"{W}–{STEPS - 1}" in plan()
    with pytest.raises(RepaError) as caught:
        plan(method__warmup_weight=0.25)
    assert caught.value.field == "method.warmup_from"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spoil", ["not finite", "setting", "weight"])
def test_a_spoilt_checkpoint_is_refused(
    erw: Settings, first: Path, spoil: str, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    state = state_of(first, W)
    if spoil == "setting":
        state["repa"]["settings"]["method"]["of_tomorrow"] = 1
    name = "method.projectors.0.0.bias"
    if spoil == "weight":
        state["state_dict"][name] = state["state_dict"][name][1:]
    if spoil == "not finite":
        state["state_dict"][name] = torch.full_like(state["state_dict"][name], torch.nan)
    file = tmp_path / "spoilt.ckpt"
    torch.save(state, file)
    with pytest.raises(RepaError) as caught:
        run_fit(erw(method__warmup_from=str(file)))
    assert caught.value.field == "method.warmup_from"
