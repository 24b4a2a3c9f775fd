"""SRA with two times as a run; what all methods have in common is tested with all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from repa.data.format.columns import MOMENTS
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from repa.trainer import compiling
from repa.trainer.config import TrainConfig
from repa.trainer.models.sit import SiTConfig
from repa.trainer.objectives.flow import Flow
from repa.trainer.run.checks import check
from repa.trainer.run.metrics import read_metrics
from repa.trainer.run.phases import describe_phases
from repa.trainer.step import module
from warmed import Warmed

Settings = Callable[..., TrainConfig]
Fit = Callable[..., Any]
VARIANTS: dict[str, dict[str, Any]] = {
    "dts_as": {"method__preset": "dts_as", "method__whole": 0.25, "method__stop": 3},
    "self_flow": {"method__times": "two", "method__teacher": "self_flow"},
}


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of latents without any teacher."""
    path = tmp_path_factory.mktemp("sra") / "latents"
    synthetic_cache(path, num_rows=24, columns={MOMENTS: SYNTHETIC_COLUMNS[MOMENTS]})
    return path


@pytest.fixture(params=VARIANTS)
def sra(request: pytest.FixtureRequest, settings: Settings, latents: Path) -> Settings:
    """Settings of SRA, from block 1 to 2, in each of its variants."""

    def make(**changes: Any) -> TrainConfig:
        values = {
            "cache": str(latents),
            "method": "sra",
            "method__student_block": 1,
            "method__teacher_block": 2,
            "checkpoint_every": 2,
        }
        return settings(**{**values, **VARIANTS[request.param], **changes})

    return make


def test_a_cache_of_latents_trains_it(sra: Settings, run_fit: Fit, tmp_path: Path) -> None:
    config = sra()
    checked = check(config)
    assert checked.problems == []
    assert all(phase["columns"] == (MOMENTS,) for phase in describe_phases(checked, config))
    run_fit(config)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    stop = checked.method.config.stop or 4
    assert ["sra" in row for row in rows] == [step < stop for step in range(4)]
    for row in rows[:stop]:
        assert row["loss"] == pytest.approx(row["velocity"] + row["sra_weight"] * row["sra"], rel=1e-6)
        assert row["sra_student_norm"] > 0
        assert row["sra_teacher_norm"] > 0
        assert -1 <= row["sra_cosine_channel"] <= 1
        assert -1 <= row["sra_cosine_token"] <= 1


def test_whole_images_train_as_with_one_time(
    settings: Settings, latents: Path, run_fit: Fit, tmp_path: Path
) -> None:
    """ρ = 1: the time of the last group is the baseline's, and its tokens attend to all."""
    values = {"cache": str(latents), "method": "sra", "method__student_block": 1, "method__teacher_block": 2}
    values |= {"method__offset": 0.0, "method__preset": "released"}
    run_fit(settings(**values), "one")
    run_fit(settings(**values, method__times="two", method__separate=True, method__whole=1.0), "whole")
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "whole")]
    for first, second in zip(*rows, strict=True):
        assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize("objective", ["flow", "one-time"])
def test_a_backbone_or_an_objective_of_one_time_is_refused(
    settings: Settings, latents: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    values = {"cache": str(latents), "method": "sra", "method__student_block": 1, "method__teacher_block": 2}
    if objective == "flow":
        facts = SiTConfig.facts.fget
        assert facts is not None
        monkeypatch.setattr(
            SiTConfig, "facts", property(lambda self: replace(facts(self), token_times=False))
        )
    else:
        monkeypatch.setattr(Flow, "token_times", False)
    assert check(settings(**values)).problems == []
    (problem,) = check(settings(**values, method__times="two")).problems
    assert problem.field == ("--model" if objective == "flow" else "objective")


def test_blocks_of_one_stage_of_a_u_shaped_network(
    settings: Settings, latents: Path, tiny_down: str, run_fit: Fit, tmp_path: Path
) -> None:
    """The remedy of what is refused is what trains; the tokens of several stages cannot have groups."""
    values = {"cache": str(latents), "model": tiny_down, "method": "sra", "method__student_block": 1}
    (problem,) = check(settings(**values, method__teacher_block=2)).problems
    assert problem.field == "method.student_block"
    (other,) = re.findall(r"`--set method\.teacher_block=(\d+)`", problem.remedy)
    config = settings(**values, method__teacher_block=int(other), max_steps=1)
    run_fit(config)
    assert "sra" in read_metrics(tmp_path / "run" / "metrics.csv")[0]
    (problem,) = check(settings(**values, method__teacher_block=int(other), method__separate=True)).problems
    assert problem.field == "--model"


def test_killed_and_resumed(
    sra: Settings,
    undisturbed: Callable[..., Path],
    run_fit: Fit,
    killed_fit: Callable[..., None],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
) -> None:
    """With what is measured at one time an image: the held-out loss and the angle of gradients."""
    config = sra(holdout=8, eval_every=2, gradient_angle_every=2)
    killed_fit(config, "killed", moment=4)
    outcome, _ = run_fit(config, "killed")
    assert outcome.resumed_from == 2
    same_run(undisturbed(config), tmp_path / "killed", 4)
    row = read_metrics(tmp_path / "killed" / "metrics.csv")[1]
    assert row["held_out_ema"] > 0
    assert -1 <= row["gradient_angle"] <= 1


def test_one_batch_of_eight_is_two_of_four(sra: Settings, run_fit: Fit, tmp_path: Path) -> None:
    """The offsets are drawn for the whole step; cosines over tokens and channels are of one image."""
    for accumulate in (1, 2):
        run_fit(sra(accumulate=accumulate), f"{accumulate}")
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("1", "2")]
    for once, twice in zip(*rows, strict=True):
        assert once == pytest.approx(twice, rel=2e-5)


@pytest.mark.parametrize("how", ["blocks", "whole"])
@pytest.mark.parametrize("sra", ["dts_as"], indirect=True)
def test_compiled_is_plain_within_rounding(
    sra: Settings, how: str, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the ``eager`` backend, which leaves what dynamo captures, of student and teacher."""
    compiled = []
    compile_backbone = module.compile_backbone
    monkeypatch.setattr(
        module, "compile_backbone", lambda *given: (compiled.append(1), compile_backbone(*given))
    )
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    run_fit(sra(compile=how, max_steps=2), "compiled")
    assert len(compiled) == 2
    run_fit(sra(max_steps=2), "plain")
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("compiled", "plain")]
    for first, second in zip(*rows, strict=True):
        assert first == pytest.approx(second, rel=1e-5)


TWO_RANKS = """
import io, sys
from pathlib import Path
from rich.console import Console
import torch
torch.set_num_threads(1)
from repa.trainer.config import build
from repa.trainer.settings_file import load_yaml
from repa.trainer.run import assembly
from repa.trainer.run.fit import fit
from repa.trainer.run.launch import is_leader
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.step.module import TrainingModule

if __name__ == "__main__":
    SIT_SIZES["T"] = SiTSize(depth=2, width=48, heads=3)
    run, built = Path(sys.argv[1]), assembly.build_backbone

    def build_differently(config, method, seed, condition=None):
        return built(config, method, seed if is_leader() else seed + 1, condition)

    def save(self, moment):
        torch.save(self.ema.state_dict(), run / f"{moment}-{self.global_rank}.pt")

    assembly.build_backbone = build_differently
    TrainingModule.setup = lambda self, stage: save(self, "built")
    TrainingModule.on_train_end = lambda self: save(self, "ended")
    config = build(load_yaml(Path(sys.argv[2])))
    fit(config, run, console=Console(file=io.StringIO()))
"""


@pytest.mark.slow
def test_the_teacher_is_equal_on_two_ranks(
    settings: Settings, latents: Path, tmp_path: Path, warmed: Warmed
) -> None:
    """Even where each rank builds another network: DDP hands out the average with all other parameters."""
    config = settings(
        cache=str(latents),
        method="sra",
        method__student_block=1,
        method__teacher_block=2,
        trainer__devices=2,
        trainer__accelerator="cpu",
        ema_decay=0.9,
        lr=1e-2,
    )
    script, file, run = tmp_path / "two_ranks.py", tmp_path / "config.yaml", tmp_path / "run"
    script.write_text(TWO_RANKS)
    file.write_text(config.to_yaml())
    ended = warmed.run(script, run, file, ranks=2)
    assert [each.returncode for each in ended] == [0, 0], ended
    states = {
        name: torch.load(run / f"{name}.pt", weights_only=True)
        for name in ("built-0", "built-1", "ended-0", "ended-1")
    }
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(states["built-0"][key], states["built-1"][key])
    assert not torch.equal(states["built-0"][key], states["ended-0"][key])
    for key, value in states["ended-0"].items():
        assert torch.equal(value, states["ended-1"][key]), key
