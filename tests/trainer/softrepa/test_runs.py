"""Runs of SoftREPA: what is trained, resume to the bit, the end by the held-out loss, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.testing import expected_row, synthetic_cache, synthetic_captions
from repa.trainer.run.checked import ProblemsError
from repa.trainer.run.metrics import read_metrics
from repa.trainer.softrepa import step
from repa.trainer.softrepa.checks import check
from repa.trainer.softrepa.file import read_soft_tokens
from repa.trainer.softrepa.settings import PRESETS, build
from repa.trainer.softrepa.step import SoftModule, cycled_rate, draw
from repa.trainer.step.checkpoints import checkpoints_of
from small_diffusion import save_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from repa.trainer.run.fit import Outcome
    from repa.trainer.softrepa.settings import SoftConfig

    Settings = Callable[..., SoftConfig]
    Fit = Callable[..., tuple[Outcome, str]]

KINDS = ("sd15", "sdxl", "sd3")


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_everything_is_the_same_to_the_bit(
    kind: str, soft_settings: Settings, soft_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = soft_settings(kind)
    outcome, _ = soft_fit(config, "whole")
    assert (outcome.step, outcome.finished) == (4, True)
    with monkeypatch.context() as patch:
        record = SoftModule._record

        def die(self: SoftModule, *values: Any) -> None:
            if self.global_step == 4:
                raise Killed
            record(self, *values)

        patch.setattr(SoftModule, "_record", die)
        with pytest.raises(Killed):
            soft_fit(config, "killed")
    assert max(checkpoints_of(tmp_path / "killed")) == 2
    assert soft_fit(config, "killed")[0].resumed_from == 2
    for name in ("metrics.csv", "tokens.safetensors", "tokens-best.safetensors", "softrepa.yaml"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    one, two = (
        torch.load(checkpoints_of(tmp_path / each)[4], weights_only=True) for each in ("whole", "killed")
    )
    trained = {"soft.tokens", "soft.time_table"} if kind != "sdxl" else {"soft.tokens"}
    assert one["state_dict"].keys() == trained
    assert all(torch.equal(each, two["state_dict"][name]) for name, each in one["state_dict"].items())
    for number, moments in one["optimizer_states"][0]["state"].items():
        for name, each in moments.items():
            assert torch.equal(each, two["optimizer_states"][0]["state"][number][name])
    assert one["CacheData"] == two["CacheData"] == {"images_seen": 16}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_a_time_change_nothing_but_the_last_digits(
    kind: str, soft_settings: Settings, soft_fit: Fit, tmp_path: Path
) -> None:
    tokens = []
    for rows in (1, 4):
        # of a learning rate so small that steps do not multiply what rounding does to Adam's signs
        soft_fit(soft_settings(kind, rows=rows, max_steps=2, holdout=0), f"rows{rows}")
        tokens.append(read_metrics(tmp_path / f"rows{rows}" / "metrics.csv")[0])
    assert tokens[0].keys() == tokens[1].keys()
    for name, value in tokens[0].items():
        assert value == pytest.approx(tokens[1][name], rel=1e-4), name


def test_the_tokens_begin_as_the_empty_captions_first_state_and_say_what_they_are_of(
    soft_settings: Settings, soft_fit: Fit, tmp_path: Path, models: dict[str, Path]
) -> None:
    config = soft_settings(start="as_released", lr=1e-12, lr_min=0.0, weight_decay=0.0, max_steps=1)
    soft_fit(config)
    soft, notes = read_soft_tokens(tmp_path / "run" / "tokens.safetensors")
    states = expected_row("clip-l-text/states", 0, ColumnSpec(shape=(7, 12), dtype="float16"))
    expected = torch.from_numpy(states[0]).float().expand(4, -1)
    torch.testing.assert_close(soft.tokens.detach(), expected, rtol=0, atol=1e-6)
    assert (notes.kind, notes.bins, notes.blocks, notes.text_length) == ("sd15", 100, ["down"], 7)
    assert (notes.model, notes.condition, notes.step) == (str(models["sd15"]), "clip-l-text/states", 1)
    assert len(notes.model_sha256) == 64


def test_equal_captions_are_no_negatives(
    soft_settings: Settings, soft_fit: Fit, tmp_path: Path, models: dict[str, Path]
) -> None:
    """Where all images have one caption nothing can be told apart, and the loss is 0."""
    cache = tmp_path / "same"
    synthetic_cache(cache, num_rows=12, columns={MOMENTS: ColumnSpec(shape=(8, 8, 8), dtype="float32")})
    text = {"clip-l-text/states": ColumnSpec(shape=(7, 12), dtype="float16")}
    synthetic_captions(cache, columns=text, captions=[["one and the same"]] * 12)
    soft_fit(soft_settings(cache=str(cache), holdout=0, max_steps=2, checkpoint_every=2))
    for row in read_metrics(tmp_path / "run" / "metrics.csv"):
        assert row["contrast"] == pytest.approx(0, abs=1e-5)
        assert row["retrieval"] == 1
        assert row["error_others"] == 0
        assert row["loss"] == pytest.approx(10 * row["error_matched"], rel=1e-6)


def test_the_held_out_loss_ends_a_run_and_its_best_tokens_are_kept(
    soft_settings: Settings, soft_fit: Fit, tmp_path: Path
) -> None:
    config = soft_settings(eval_every=1, patience=2, max_steps=50, lr=1e-12, lr_min=0.0)
    outcome, said = soft_fit(config)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    losses = [row["held_out"] for row in rows]
    best = losses.index(min(losses)) + 1
    assert outcome.finished
    assert outcome.step == len(rows) == best + 2 < 50
    assert read_soft_tokens(tmp_path / "run" / "tokens-best.safetensors")[1].step == best
    assert read_soft_tokens(tmp_path / "run" / "tokens.safetensors")[1].step == outcome.step
    assert f"step {best}" in said
    for row in rows:
        accuracies = [row[f"held_out_retrieval_t{each}"] for each in range(10)]
        assert row["held_out_retrieval"] == pytest.approx(sum(accuracies) / 10)
    again, _ = soft_fit(config)
    assert (again.trained, again.finished) == (False, True)
    on, _ = soft_fit(soft_settings(eval_every=1, patience=4, max_steps=50, lr=1e-12, lr_min=0.0))
    assert on.step == best + 4


def test_the_weight_of_matched_pairs_lowers_their_error(
    soft_settings: Settings, soft_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one batch of four images at one time and noise."""
    monkeypatch.setattr(step, "draw", lambda seed, _, *shape: draw(seed, 0, *shape))
    few = {"rows": 4, "holdout": 35, "eval_every": 100, "checkpoint_every": 12, "max_steps": 12}
    soft_fit(soft_settings("sd3", **few, lr=0.05, matched_weight=10.0))
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    errors = [row["error_matched"] for row in rows]
    assert errors[-1] < errors[0] - 1e-3
    for row in rows:
        assert row["loss"] == pytest.approx(row["contrast"] + 10 * row["error_matched"], rel=1e-5)


def test_bfloat16_trains_float32_tokens(soft_settings: Settings, soft_fit: Fit, tmp_path: Path) -> None:
    soft_fit(soft_settings("sd3", dtype="bfloat16", condition="sd3-context/states"))
    weights = torch.load(checkpoints_of(tmp_path / "run")[4], weights_only=True)["state_dict"]
    assert {each.dtype for each in weights.values()} == {torch.float32}
    assert all(torch.isfinite(each).all() for each in weights.values())


def test_the_learning_rate_falls_and_begins_again() -> None:
    config = build({"lr": 1e-3, "lr_min": 1e-5, "cycle": 100})
    assert cycled_rate(config, 0) == cycled_rate(config, 100) == pytest.approx(1e-3)
    assert cycled_rate(config, 50) == pytest.approx((1e-3 + 1e-5) / 2)
    assert cycled_rate(config, 99) == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + math.cos(0.99 * math.pi)) / 2)


def fields_of(config: SoftConfig) -> set[str]:
    return {problem.field for problem in check(config).problems}


def test_the_presets_of_the_kinds(soft_settings: Settings) -> None:
    for kind in KINDS:
        checked = check(soft_settings(kind))
        assert checked.problems == []
        assert checked.config is not None
        for name, value in PRESETS[kind].items():
            assert getattr(checked.config, name) == (3 if name == "layers" else value)
    assert check(soft_settings("sdxl")).shape == (8, 12)
    assert check(soft_settings("sd3")).shape == (3, 4, 16)


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        ("sd15", {"layers": 2}, "layers"),
        ("sd3", {"blocks": ("down",)}, "blocks"),
        ("sd15", {"blocks": ()}, "blocks"),
        ("sd3", {"layers": 5}, "layers"),
        ("sd3", {"start": "bos"}, "start"),
        ("sdxl", {"interpolate": True}, "interpolate"),
        ("sdxl", {"time_start": "zero"}, "time_start"),
        ("sd15", {"tokens": 900_000}, "tokens"),
        ("sd15", {"condition": ""}, "condition"),
        ("sd15", {"condition": "sd3-text/states"}, "condition"),
        ("sd15", {"condition": "none-text/states"}, "condition"),
        ("sd15", {"model": ""}, "--model"),
        ("sd15", {"model": "nowhere"}, "--model"),
        ("sd15", {"cache": ""}, "--cache"),
        ("sd15", {"cache": "tars/{000..001}.tar"}, "--cache"),
        ("sd15", {"batch_size": 40, "holdout": 0}, "--batch-size"),
        ("sd15", {"holdout": 3}, "holdout"),
    ],
)
def test_what_cannot_start_is_refused_before_any_weight_is_read(
    kind: str, changes: dict[str, Any], field: str, soft_settings: Settings
) -> None:
    assert field in fields_of(soft_settings(kind, **changes))


def test_several_processes_are_refused(soft_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("GROUP_RANK", "0")
    assert "--batch-size" in fields_of(soft_settings())


def test_latents_of_another_autoencoder_and_several_views_are_refused(
    soft_settings: Settings, tmp_path: Path
) -> None:
    for name, channels, views, field in (
        ("wide", 32, ("original",), "--cache"),
        ("views", 8, ("original", "flip"), "--cache"),
    ):
        moments = {MOMENTS: ColumnSpec(shape=(channels, 8, 8), dtype="float32")}
        synthetic_cache(tmp_path / name, num_rows=12, columns=moments, views=views)
        text = {"clip-l-text/states": ColumnSpec(shape=(7, 12), dtype="float16")}
        synthetic_captions(tmp_path / name, columns=text)
        assert fields_of(soft_settings(cache=str(tmp_path / name), holdout=0)) == {field}
    synthetic_cache(tmp_path / "bare", num_rows=12, columns=moments)
    assert "condition" in fields_of(soft_settings(cache=str(tmp_path / "bare"), condition="", holdout=0))


def test_a_run_goes_on_with_its_own_settings_denoiser_and_cache_alone(
    soft_settings: Settings, soft_fit: Fit, tmp_path: Path
) -> None:
    soft_fit(soft_settings())
    with pytest.raises(RepaError) as error:
        soft_fit(soft_settings(lr=0.5, max_steps=6))
    assert error.value.field == "lr"
    other = save_model(tmp_path / "other", "sd15")
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CacheError) as changed:
        soft_fit(soft_settings(model=str(other), max_steps=6))
    assert changed.value.field == "--model"
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.yaml").write_text("method: repa\n")
    with pytest.raises(RepaError) as foreign:
        soft_fit(soft_settings(), "plain")
    assert foreign.value.field == "--run"
    longer, _ = soft_fit(soft_settings(max_steps=6))
    assert (longer.step, longer.resumed_from) == (6, 4)


def test_problems_are_listed_together(soft_settings: Settings, soft_fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(ProblemsError) as error:
        soft_fit(soft_settings(layers=2, batch_size=40, holdout=0))
    assert {problem.field for problem in error.value.problems} == {"layers", "--batch-size"}
    assert not (tmp_path / "run").exists()


def test_a_run_whose_time_is_up_is_saved_and_goes_on(
    soft_settings: Settings, soft_fit: Fit, tmp_path: Path
) -> None:
    stopped, _ = soft_fit(soft_settings(max_time="00:00:00:00", checkpoint_every=100))
    assert (stopped.step, stopped.finished) == (1, False)
    assert list(checkpoints_of(tmp_path / "run")) == [1]
    assert read_soft_tokens(tmp_path / "run" / "tokens.safetensors")[1].step == 1
    done, _ = soft_fit(soft_settings(checkpoint_every=100))
    assert (done.step, done.resumed_from, done.finished) == (4, 1, True)


def test_tokens_that_are_not_finite_are_not_saved(
    soft_settings: Settings, soft_fit: Fit, tmp_path: Path
) -> None:
    with pytest.raises(RepaError) as error:
        soft_fit(soft_settings(lr=1e30, holdout=0))
    assert error.value.field in {"weights", "loss", "contrast", "error_matched"}
    assert "clip" not in error.value.remedy
