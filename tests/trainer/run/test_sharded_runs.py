"""Weights that are cut over two devices: resumed with others, looked at by ranks of their own, refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from every_method import small_config, write_cache
from repa.trainer.config import TrainConfig
from repa.trainer.methods.repa import Repa
from repa.trainer.run.checks import check
from repa.trainer.run.metrics import read_metrics
from repa.trainer.run.sharded_strategy import sharding_problems
from repa.trainer.step.checkpoints import checkpoints_of
from torch import nn

if TYPE_CHECKING:
    from warmed import Warmed

Fit = Callable[..., Any]

CUT = {"trainer__devices": 2, "trainer__accelerator": "cpu", "trainer__strategy": "fsdp"}

RANK = """
import io, sys, warnings
from pathlib import Path
from rich.console import Console
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from every_method import shrink
from repa.trainer import compiling
from repa.trainer.config import build
from torch._dynamo.utils import counters
from repa.trainer.run.fit import fit
from repa.trainer.settings_file import load_yaml

class Pixels:
    name, weights_sha256 = "pixels", "0"
    def decode(self, latent):
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)

if __name__ == "__main__":
    shrink()
    # of dynamo, of the input of a block
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    compiling.BACKEND = "eager"
    for file in sorted(Path(sys.argv[2]).glob("*.yaml")):
        run = file.with_name(file.stem.partition("-")[2])
        printed = Console(file=io.StringIO())
        outcome = fit(build(load_yaml(file)), run, console=printed, decoder=Pixels())
        print(run.name, outcome.resumed_from, outcome.step)
    print("graphs", counters["stats"]["unique_graphs"], "breaks", len(counters["graph_break"]))
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    from every_method import shrink

    shrink(monkeypatch)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("sharded") / "cache")


def checkpoint_of(run: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(checkpoints_of(run)[step], weights_only=True)
    return found


def same(one: Path, two: Path, step: int, **tolerance: float) -> None:
    first, second = checkpoint_of(one, step), checkpoint_of(two, step)
    assert first.keys() == second.keys()
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(first[key], second[key], **tolerance)
    assert first["CacheData"] == second["CacheData"]


Train = Callable[..., list[str]]


@pytest.fixture
def on_two(tmp_path: Path, warmed: Warmed) -> Train:
    """Train by configurations, one after another on the same two processes; what rank 0 printed."""

    def train(*asked: tuple[str, TrainConfig]) -> list[str]:
        runs, script = tmp_path / "runs", tmp_path / "rank.py"
        runs.mkdir(exist_ok=True)
        script.write_text(RANK)
        for number, (name, config) in enumerate(asked):
            (runs / f"{number}-{name}.yaml").write_text(config.to_yaml())
        ended = warmed.run(script, Path(__file__).parents[2] / "support", runs, ranks=2)
        assert [each.returncode for each in ended] == [0, 0], ended
        assert ended[0].stdout == ended[1].stdout
        return ended[0].stdout.splitlines()

    return train


@pytest.mark.slow
def test_runs_go_on_with_other_devices(rows: Path, run_fit: Fit, on_two: Train, tmp_path: Path) -> None:
    """HASTE over τ, with held-out rows for one rank alone and previews.

    A run that is cut is the same to the bit when it is stopped and resumed, also with blocks that are
    computed again, and that of DDP to rounding.
    """
    runs = tmp_path / "runs"

    def config(**changes: Any) -> TrainConfig:
        previews = {"preview_every": 2, "preview_steps": 2, "preview_count": 3}
        return small_config("haste", rows, checkpoint_every=2, **previews, **changes)

    run_fit(config(max_steps=2), "runs/one-then-two")
    said = on_two(
        ("whole", config(**CUT)),
        ("resumed", config(**CUT, max_steps=2)),
        ("resumed", config(**CUT, activation_checkpointing=1)),
        ("one-then-two", config(**CUT)),
        ("uncut", config(**{**CUT, "trainer__strategy": "ddp"})),
    )
    assert said[:5] == ["whole 0 4", "resumed 0 2", "resumed 2 4", "one-then-two 2 4", "uncut 0 4"]
    same(runs / "whole", runs / "resumed", 4, rtol=0, atol=0)
    assert (runs / "whole" / "metrics.csv").read_bytes() == (runs / "resumed" / "metrics.csv").read_bytes()
    same(runs / "whole", runs / "uncut", 4, rtol=1e-4, atol=1e-6)
    tables = (read_metrics(runs / each / "metrics.csv") for each in ("whole", "uncut"))
    for one, two in zip(*tables, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    pictures = [sorted((runs / each / "samples").iterdir()) for each in ("whole", "uncut")]
    assert [len(each) for each in pictures] == [2, 2]
    assert [each.read_bytes() for each in pictures[0]] == [each.read_bytes() for each in pictures[1]]

    back = tmp_path / "back"
    shutil.copytree(runs / "whole", back)
    checkpoints_of(back)[4].unlink()
    outcome, _ = run_fit(config(), "back")
    assert (outcome.resumed_from, outcome.step) == (2, 4)
    # one device draws other noise than two, for the same rows
    before, after, whole = (checkpoint_of(*each) for each in ((back, 2), (back, 4), (runs / "whole", 4)))
    assert after.keys() == whole.keys()
    assert after["CacheData"] == whole["CacheData"]
    assert list(after["optimizer_states"][0]["state"]) == list(whole["optimizer_states"][0]["state"])
    name = "backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(after["state_dict"][name], before["state_dict"][name])


@pytest.mark.thorough
def test_blocks_are_compiled_and_computed_again(rows: Path, on_two: Train, tmp_path: Path) -> None:
    """One graph for the blocks whose attention is looked at, one for the others, projector and loss."""
    compiled = small_config("haste", rows, **CUT, compile="blocks", activation_checkpointing=1)
    said = on_two(("compiled", compiled), ("plain", small_config("haste", rows, **CUT)))
    assert said[-1] == "graphs 4 breaks 0"
    same(tmp_path / "runs" / "plain", tmp_path / "runs" / "compiled", 4, rtol=1e-4, atol=1e-6)


def fields_of(config: TrainConfig) -> list[str]:
    return [problem.field for problem in check(config).problems]


def test_what_it_cannot_do_is_refused(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fields_of(small_config("repa", rows, **CUT)) == []
    assert fields_of(small_config("repa", rows, **CUT, gradient_angle_every=2)) == ["gradient_angle_every"]
    assert fields_of(small_config("repa", rows, **CUT, compile="whole")) == ["compile"]
    assert "trainer.strategy" in fields_of(small_config("repa", rows, trainer__strategy="deepspeed_stage_2"))
    # of a GPU, as a CPU refuses it anyway
    method = check(small_config("repa", rows)).method
    assert method is not None
    half = small_config("repa", rows, **CUT, precision="16-mixed")
    assert [each.field for each in sharding_problems(half, method)] == ["precision"]
    build = Repa.__init__

    def with_a_number(self: Repa, *arguments: Any) -> None:
        build(self, *arguments)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    monkeypatch.setattr(Repa, "__init__", with_a_number)
    assert fields_of(small_config("repa", rows, **CUT)) == ["trainer.strategy"]
    assert fields_of(small_config("repa", rows)) == []
