"""Whole training steps of fake tensors on CUDA, where nothing may lie elsewhere, be read or be copied."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from every_method import COLUMNS, LATENTS, NOTES, shrink, small_config, write_cache
from fake_cuda import DEVICE, Refusals, backward, fake_cuda, is_fake, moved
from repa.data.format.columns import ColumnSpec
from repa.data.reading.loader import Batch, CacheLoader
from repa.data.testing import synthetic_cache, synthetic_captions
from repa.trainer.config import TrainConfig
from repa.trainer.methods import METHODS
from repa.trainer.models.mmdit import MMDIT_SIZES, MMDiTSize
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checks import check
from repa.trainer.run.identity import identity_of
from repa.trainer.step.module import TrainingModule
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils.checkpoint import checkpoint

TEXT = "demo-text/states"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with everything that a method reads."""
    path = write_cache(tmp_path_factory.mktemp("on_cuda") / "whole")
    synthetic_captions(path, columns={TEXT: ColumnSpec(shape=(6, 12), dtype="float16")})
    return path


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with targets of int8."""
    columns = dict(LATENTS)
    for name, spec in COLUMNS.items():
        if name in LATENTS or name.endswith("/cls"):
            continue
        columns[name] = replace(spec, dtype="int8")
        columns[f"{name}-scale"] = ColumnSpec(shape=(*spec.shape[:-2], spec.shape[-1]), dtype="float32")
    path = tmp_path_factory.mktemp("on_cuda") / "int8"
    synthetic_cache(path, num_rows=24, columns=columns, notes=NOTES, resolution=64)
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.setitem(MMDIT_SIZES, "6", MMDiTSize(depth=3, width=24, heads=2))


def steps_on_cuda(config: TrainConfig, patch: pytest.MonkeyPatch) -> TrainingModule:
    """Make the first step of each phase, in as many micro-batches as Lightning would."""
    checked = check(config)
    assert checked.problems == []
    module, data = assemble(config, checked, identity_of(checked, config))
    batches = [batches_of(phase.start, config, checked, module) for phase in module.method.phases()]
    with fake_cuda(patch) as refusals:
        moved(module)
        optimizer = module.configure_optimizers()
        trainer = SimpleNamespace(world_size=1, global_rank=0, optimizers=[optimizer])
        module.trainer = trainer
        for micro_batches in batches:
            moved_batches = [data.transfer_batch_to_device(each, DEVICE, 0) for each in micro_batches]
            trainer.global_step = moved_batches[0].step
            _step(module, moved_batches, optimizer, refusals)
        assert all(map(is_fake, module.state_dict().values()))
        assert all(is_fake(each.grad) for each in module.parameters() if each.grad is not None)
    return module


def batches_of(step: int, config: TrainConfig, checked: Any, module: TrainingModule) -> list[Batch]:
    """Read the micro-batches of a step."""
    loader = CacheLoader(
        checked.reader,
        rows=checked.train_rows,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        images_seen=step * config.batch_size,
        columns_at=module.columns_at,
    )
    with closing(loader):
        batches = iter(loader)
        return [next(batches) for _ in range(config.accumulate)]


def _step(module: TrainingModule, batches: list[Batch], optimizer: Any, refusals: Refusals) -> None:
    """Make a step; what is copied once may be so in the first of several micro-batches."""
    refusals.copies = len(batches) == 1
    for batch in batches:
        module.on_train_batch_start(batch, batch.micro)

    def closure() -> None:
        optimizer.zero_grad()
        for batch in batches:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = module.training_step(batch, batch.micro)
            loss.backward()
            refusals.copies = True
        module.configure_gradient_clipping(optimizer)

    module.optimizer_step(0, 0, optimizer, closure)
    refusals.copies = False


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_each_phase(name: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_on_cuda(small_config(name, whole, precision="bf16-mixed"), monkeypatch)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("haste", {"model": "DiT-T/2", "accumulate": 2}),
    "LightningDiT": ("repa", {"model": "LightningDiT-T/2", "activation_checkpointing": 1}),
    "path": ("reg", {"objective__path": "cosine", "objective__times": "lognormal"}),
    "two times": ("sra", {"method__preset": "dts_as", "method__whole": 0.5}),
    "relations of the batch": ("urepa", {"method__pairs": "batch"}),
    "options": ("none", {"qk_norm": True, "rope": True, "rms_norm": True, "swiglu": True}),
    "class tokens": ("none", {"condition": "demo/cls", "lr_warmup": 2, "clip": None}),
    "tokens": ("none", {"model": "SiT-T/1", "latents": "demo/patch"}),
    "int8": ("haste", {}),
    "text": ("repa", {"model": "MMDiT-6/2", "condition": TEXT, "method__depth": 2}),
}


ALWAYS = ("ddpm", "int8", "text")  # the others see more of the same


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in ALWAYS else pytest.mark.thorough) for case in OTHERS]
)
def test_another_step(case: str, whole: Path, int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, changes = OTHERS[case]
    cache = int8 if case in ("int8", "tokens") else whole
    steps_on_cuda(small_config(method, cache, precision="bf16-mixed", **changes), monkeypatch)


REFUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "two devices": lambda x: x + torch.ones(2),
    "two dtypes": lambda x: x[None] @ x[:, None].bfloat16(),
    "number": lambda x: x[0].item(),
    "host": lambda x: x.cpu(),
    "from the host": lambda x: torch.ones(2).to(x.device),
    "numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "index": lambda x: x[torch.tensor([0])],
    "mask": lambda x: x[x > 0],
    "generator": lambda x: torch.randn(2, generator=torch.Generator(), device=x.device),
    "table": lambda x: nn.functional.embedding(
        torch.zeros(2, dtype=torch.int64, device=x.device), torch.ones(2, 2)
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_gpu_refuses_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as refusals:
        x = torch.ones(2, device=DEVICE)
        refusals.copies = True
        with pytest.raises((RuntimeError, DataDependentOutputException, DynamicOutputShapeException)):
            REFUSED[case](x)


def test_gradients_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk through the graph, of numbers on the CPU, with a block that is computed again."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.LayerNorm(3))
    x = torch.randn(4, 3)

    def loss() -> torch.Tensor:
        again: torch.Tensor = checkpoint(block, block(x), use_reentrant=False)
        return (again * again[0]).sum() + block[0].bias.square().sum()

    wanted = torch.autograd.grad(loss(), list(block.parameters()))
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
    backward(loss())
    torch.testing.assert_close([each.grad for each in block.parameters()], list(wanted))
