"""A training step never makes the host wait for a GPU: nothing is read back, no shape depends on values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import STEPS, STOP, shrink, small_config, write_cache
from lightning.pytorch.callbacks import Callback
from repa.trainer.config import TrainConfig
from repa.trainer.methods import METHODS
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checks import check
from repa.trainer.run.identity import identity_of
from repa.trainer.run.lightning_trainer import make_trainer, quiet_lightning
from waits import Waits

NAMES = sorted(METHODS)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with everything that a method reads."""
    return write_cache(tmp_path_factory.mktemp("waits") / "whole")


class Watch(Callback):
    """Count from the start of a batch to its end, which is forward, backward, clipping, AdamW and average."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self.batches = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._waits.on, self._waits.step = True, batch.step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._waits.on = False
        self.batches += 1


def waits_of(config: TrainConfig) -> Waits:
    """Train under Lightning and return what was counted in the steps."""
    checked = check(config)
    assert checked.problems == []
    module, data = assemble(config, checked, identity_of(checked, config))
    waits = Waits()
    watch = Watch(waits)
    trainer = make_trainer(config, callbacks=[watch])
    with quiet_lightning(), waits:
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == config.max_steps
    assert watch.batches == config.max_steps * config.accumulate
    # what is recorded of the steps is read at the end alone
    assert module.take_means()["gradient_norm"] > 0
    return waits


@pytest.mark.parametrize("name", NAMES)
def test_no_step_of_a_method_waits(name: str, whole: Path) -> None:
    """In every phase and across the boundaries of phases, with two micro-batches."""
    config = small_config(name, whole, accumulate=2)
    method = check(config).method
    assert method is not None
    assert {method.phase_at(step).name for step in range(STEPS)} == {each.name for each in method.phases()}
    assert not waits_of(config).found


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("haste", {"model": "DiT-T/2"}),
    "ddpm, averaged weights": ("sra", {"model": "DiT-T/2", "clip": None}),
    "cosine path": (
        "repa",
        {"objective__path": "cosine", "objective__times": "lognormal", "objective__shift": 0.5},
    ),
    "two times": ("sra", {"method__preset": "dts_as", "method__whole": 0.5}),
    "relations of the batch": ("urepa", {"method__pairs": "batch"}),
    "dropped labels": ("none", {"label_dropout": 0.5}),
    "options of the backbone": ("repa", {"qk_norm": True, "rope": True, "rms_norm": True, "swiglu": True}),
    "class tokens": ("none", {"condition": "demo/cls", "clip": None}),
    "learning rate": ("none", {"lr_warmup": 2, "lr_schedule": "cosine", "precision": "bf16-mixed"}),
    "computed again": ("haste", {"activation_checkpointing": 1}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_no_other_step_waits(case: str, whole: Path) -> None:
    method, changes = OTHERS[case]
    assert not waits_of(small_config(method, whole, **changes, max_steps=STOP + 1)).found


WAITING: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "truth": lambda x: bool(x[0] > 0),
    "float": lambda x: float(x[0]),
    "list": lambda x: x.tolist(),
    "host": lambda x: x.cpu(),
    "to host": lambda x: x.to("cpu"),
    "array": lambda x: x.numpy(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.clone().__setitem__(x > 0, torch.zeros(2)),
    "unique": torch.unique,
    "repeat": lambda x: x.repeat_interleave(torch.tensor([1, 2, 1])),
    "equal": lambda x: torch.equal(x, x),
    "from a list": lambda x: torch.tensor([1.0, 2.0]) + x[:2],
}


@pytest.mark.parametrize("case", WAITING)
def test_what_waits_is_counted(case: str) -> None:
    values = torch.tensor([1.0, -1.0, 2.0])
    with Waits() as waits:
        waits.on = True
        WAITING[case](values)
    assert waits.found


def test_what_does_not_wait_is_not() -> None:
    values = torch.tensor([1.0, -1.0, 2.0])
    places = torch.tensor([0, 2])
    with Waits() as waits:
        waits.on = True
        torch.where(values > 0, values, 0.0).square().mean()
        values[places].to(torch.float64).to(values.device)
        values.repeat_interleave(2)
        waits.on = False
        values.tolist()
    assert not waits.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_gpu(name: str, whole: Path) -> None:
    """As CUDA itself counts it, once the first step has allocated what it needs."""

    class Strict(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if batch.step else "default")

        def on_train_batch_end(self, *given: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    config = small_config(name, whole, accumulate=2)
    checked = check(config)
    module, data = assemble(config, checked, identity_of(checked, config))
    try:
        make_trainer(config, callbacks=[Strict()]).fit(module, datamodule=data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert module.global_step == STEPS
