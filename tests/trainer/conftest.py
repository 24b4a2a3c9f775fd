"""A network and a cache small enough to train for a few steps in a test."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from repa.data.format.columns import ColumnSpec
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from repa.trainer.config import TrainConfig, build
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.models.sit_down import SIT_DOWN_SIZES, SiTDownSize
from repa.trainer.run.fit import Outcome, fit
from repa.trainer.step.checkpoints import checkpoints_of
from repa.trainer.step.module import TrainingModule
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices are slower on several threads, and the tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a network of two blocks."""
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=3))
    return "SiT-T/2"


@pytest.fixture
def tiny_down(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a U-shaped network, with one block before and after and two on half the grid."""
    size = SiTDownSize(outer=1, middle=2, width=48, heads=3, mlp_width=64)
    monkeypatch.setitem(SIT_DOWN_SIZES, "T", size)
    return "SiT-down-T/1"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows, one of them invalid, 3 classes, latents ``[4, 4, 4]``, teacher ``demo`` on a 2×2 grid."""
    path = tmp_path_factory.mktemp("trainer") / "cache"
    synthetic_cache(path, num_rows=40, invalid={5: "damaged"})
    return path


ATTENTION_SHAPE = (3, 2, 4, 8)  # three blocks, two heads, 2×2 tokens, heads of 8


@pytest.fixture(scope="session")
def attention_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The columns of `cache`, and the attention of the teacher's blocks 1, 2, 3 in float16."""
    path = tmp_path_factory.mktemp("trainer") / "attention"
    spec = ColumnSpec(shape=ATTENTION_SHAPE, dtype="float16")
    columns = {**SYNTHETIC_COLUMNS, "demo/q": spec, "demo/k": spec}
    synthetic_cache(path, num_rows=40, invalid={5: "damaged"}, columns=columns)
    return path


@pytest.fixture
def haste(settings: Callable[..., TrainConfig], attention_cache: Path) -> Callable[..., TrainConfig]:
    """`settings` of HASTE with τ = 6."""

    def make(**changes: Any) -> TrainConfig:
        values = {
            "cache": str(attention_cache),
            "method": "haste",
            "method__depth": 1,
            "method__student_blocks": "1,2",
            "method__teacher_blocks": "3,1",
            "method__stop": 6,
            "method__projector_width": 16,
            "max_steps": 10,
        }
        return settings(**{**values, **changes})

    return make


@pytest.fixture
def settings(tiny: str, cache: Path) -> Callable[..., TrainConfig]:
    """A configuration of few, small steps; keywords are settings, with ``__`` for the dot."""

    def make(**changes: Any) -> TrainConfig:
        values = {
            "cache": str(cache),
            "model": tiny,
            "method": "repa",
            "max_steps": 4,
            "batch_size": 8,
            "precision": "32-true",
            "compile": "off",
            "log_every": 1,
            "checkpoint_every": 4,
            "preview_every": 0,
        }
        if changes.get("method", "repa") == "repa":
            values |= {"method.depth": 1, "method.projector_width": 16}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return build(flags=values)

    return make


@pytest.fixture
def run_fit(tmp_path: Path) -> Callable[..., tuple[Outcome, str]]:
    """Train in ``tmp_path / name``; the outcome and what was printed."""

    def run(config: TrainConfig, name: str = "run", **options: Any) -> tuple[Outcome, str]:
        printed = io.StringIO()
        outcome = fit(config, tmp_path / name, console=Console(file=printed, width=200), **options)
        return outcome, printed.getvalue()

    return run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train by a configuration and let nothing stop it, once for all tests; the folder of the run."""
    runs: dict[str, Path] = {}

    def run(config: TrainConfig, **options: Any) -> Path:
        settings = config.to_yaml()
        if settings not in runs:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            assert fit(config, folder, console=Console(file=io.StringIO()), **options).finished
            runs[settings] = folder
        return runs[settings]

    return run


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would take seconds to start."""


@pytest.fixture
def killed_fit(
    run_fit: Callable[..., tuple[Outcome, str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """`run_fit` that dies in the middle of a step, counted from 1: the optimiser has stepped, the EMA not."""

    def run(config: TrainConfig, name: str, *, moment: int, **options: Any) -> None:
        update = TrainingModule.update_ema
        steps = []

        def update_and_die(self: Any) -> None:
            steps.append(1)
            if len(steps) == moment:
                raise Killed
            update(self)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingModule, "update_ema", update_and_die)
            with pytest.raises(Killed):
                run_fit(config, name, **options)

    return run


def states_of(run: Path, step: int) -> dict[str, Any]:
    """A checkpoint of a run's folder."""
    checkpoint: dict[str, Any] = torch.load(checkpoints_of(run)[step], weights_only=True)
    return checkpoint


@pytest.fixture
def same_run() -> Callable[[Path, Path, int], None]:
    """Asserts that two runs' metrics, weights, moments and places in the data are equal to the bit."""

    def check(first: Path, second: Path, step: int) -> None:
        assert (first / "metrics.csv").read_bytes() == (second / "metrics.csv").read_bytes()
        one, two = states_of(first, step), states_of(second, step)
        assert one["state_dict"].keys() == two["state_dict"].keys()
        for key, value in one["state_dict"].items():
            assert torch.equal(value, two["state_dict"][key]), key
        moments = (one["optimizer_states"][0]["state"], two["optimizer_states"][0]["state"])
        for number, values in moments[0].items():
            for key, value in values.items():
                assert torch.equal(value, moments[1][number][key]), (number, key)
        assert one["CacheData"] == two["CacheData"]

    return check
