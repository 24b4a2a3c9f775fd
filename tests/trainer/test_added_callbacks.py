"""Callbacks from outside, added by name: who may name them, what they see, what a checkpoint keeps."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from repa.data import outside
from repa.data.errors import RepaError
from repa.trainer.added_callbacks import GROUP, SETTING, check_state, make_callbacks
from repa.trainer.config import build
from repa.trainer.run.checked import ProblemsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig
    from repa.trainer.run.fit import Outcome

    Settings = Callable[..., TrainConfig]
    Fit = Callable[..., tuple[Outcome, str]]
    Write = Callable[[str], str]

COUNTING = """
from lightning.pytorch import Callback
seen = []
class Counting(Callback):
    steps = 0
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.steps += 1
        seen.append((trainer.global_step, self.steps))
        module.log("extra", 0.5 * self.steps)
    def state_dict(self):
        return {"steps": self.steps}
    def load_state_dict(self, state):
        self.steps = state["steps"]
"""
_numbers = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module that can be imported; returns its name, which no other test has."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(outside, "_imported", {})

    def module(text: str) -> str:
        name = f"callbacks_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return module


def test_it_is_called_and_its_state_goes_on(
    write: Write, settings: Settings, run_fit: Fit, tmp_path: Path
) -> None:
    module = write(COUNTING)
    name = f"{module}:Counting"
    values = {"trainer__callbacks": f"[{name}]", "loggers": "csv", "checkpoint_every": 2}
    config = settings(max_steps=2, **values)
    assert config.trainer["callbacks"] == [name]
    run_fit(config)
    run_fit(settings(max_steps=4, **values))
    seen = __import__(module).seen
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]
    # what it logs goes to the loggers
    assert "extra" in (tmp_path / "run" / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "extra" not in (tmp_path / "run" / "metrics.csv").read_text()


def test_a_file_alone_imports_nothing(write: Write, settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    """A run's folder of somebody else runs no code, and yet can be sampled from."""
    name = f"{write('raise SystemExit(3)')}:Counting"
    values = yaml.safe_load(settings().to_yaml())
    values["trainer"] = {"callbacks": [name]}
    config = build(values)  # which is enough to sample
    assert config.trainer["callbacks"] == [name]
    with pytest.raises(ProblemsError) as caught:
        run_fit(config)
    (problem,) = caught.value.problems
    assert problem.field == SETTING
    assert f"--set {SETTING}={name}" in problem.remedy
    assert not (tmp_path / "run").exists()
    with pytest.raises(RepaError) as of_import:
        build(values, {}, [f"{SETTING}={name}"])
    assert of_import.value.field == SETTING
    assert build(values, {}, [f"{SETTING}=[]"]).trainer["callbacks"] == []


def test_installed_packages_offer_callbacks(write: Write, settings: Settings, tmp_path: Path) -> None:
    module = write(COUNTING)
    folder = tmp_path / "counting-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{GROUP}]\ncounting = {module}:Counting\n")
    values = yaml.safe_load(settings().to_yaml())
    values["trainer"] = {"callbacks": ["counting"]}
    (made,) = make_callbacks(build(values).trainer["callbacks"])
    assert type(made).__name__ == "Counting"
    with pytest.raises(RepaError) as caught:
        make_callbacks(["other"])
    assert caught.value.field == SETTING


@pytest.mark.parametrize(
    "text",
    [
        "class Added: pass",
        "def Added(number): pass",
        "def Added(): raise ValueError('\\033[31mno\\n')",
        "from lightning.pytorch import Callback\nclass Added(Callback):\n"
        "    def state_dict(self): return {'when': object()}",
    ],
)
def test_what_is_no_callback(write: Write, text: str) -> None:
    name = f"{write(text)}:Added"
    config = build(assignments=[f"{SETTING}={name}"])
    with pytest.raises(RepaError) as caught:
        make_callbacks(config.trainer["callbacks"])
    assert caught.value.field == SETTING
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("plain", [None, {"a": [1, 2.5, ("b", True)], "c": torch.ones(2)}, {1: b""}])
def test_states_that_can_be_kept(plain: Any) -> None:
    check_state("x", plain)
    for wrong in ({1, 2}, {"a": [plain, object()]}, {object(): 1}):
        with pytest.raises(RepaError):
            check_state("x", wrong)
