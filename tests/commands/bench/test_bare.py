"""The bare loop against the same loop by hand; turns, and what is computed of them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from every_method import shrink, small_config, write_cache
from repa.commands.bench import arithmetic
from repa.commands.bench.arithmetic import product_flops
from repa.commands.bench.bare import BareLoop, StepClock, can_be_bare
from repa.commands.bench.measured import BenchSettings, Measured
from repa.data.errors import RepaError
from repa.trainer.config import TrainConfig
from repa.trainer.methods import METHODS
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checks import check
from repa.trainer.run.identity import identity_of
from repa.trainer.run.lightning_trainer import make_trainer, quiet_lightning
from repa.trainer.run.utilisation import known_peak

if TYPE_CHECKING:
    from pathlib import Path

    from repa.data.reading.loader import Batch
    from repa.trainer.input.datamodule import CacheData
    from repa.trainer.step.module import TrainingModule


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What every method can be trained from, on networks that are small."""
    shrink(monkeypatch)
    return write_cache(tmp_path / "cache")


def built(config: TrainConfig) -> tuple[TrainingModule, CacheData]:
    checked = check(config)
    assert not checked.problems
    return assemble(config, checked, identity_of(checked, config))


def sgd(module: TrainingModule) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for each in module.parameters() if each.requires_grad], lr=0.1)


def first_batch(config: TrainConfig, data: CacheData) -> Batch:
    data.trainer = make_trainer(config)
    batch = next(iter(data.train_dataloader()))
    data.teardown("fit")
    return batch


def test_a_step_is_that_of_a_loop_by_hand(cache: Path) -> None:
    config = small_config("repa", cache)
    module, data = built(config)
    batch = first_batch(config, data)
    twin = copy.deepcopy(module)
    # not AdamW, which makes whole steps of gradients that are 0 but for rounding
    loop = BareLoop(module, sgd(module), batch, nullcontext)
    loop.step()
    loop.step()

    # the constants that the loop drew, by its seed
    generator = torch.Generator().manual_seed(0)
    shape = (len(batch.label), *module.latent_shape)
    x0, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    t = torch.rand(len(x0), generator=generator)
    per_image = t.view(-1, 1, 1, 1)
    optimizer = sgd(twin)
    (column,) = (name for name in batch.columns if name.endswith("/patch"))
    for _ in range(2):
        optimizer.zero_grad()
        phase = twin.method.phase_at(0)
        student = twin.backbone(
            (1 - per_image) * x0 + per_image * noise, t, batch.label, twin.method.capture(phase)
        )
        (hidden,) = student.hidden.values()
        (project,) = twin.method.projectors
        cosine = F.cosine_similarity(project(hidden), batch.columns[column].float(), dim=-1).mean()
        loss = F.mse_loss(student.prediction, noise - x0) - twin.method.config.weight * cosine
        loss.backward()
        optimizer.step()
    moved = dict(twin.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, moved[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(module.backbone.blocks[0].mlp.fc1.weight, module.ema.blocks[0].mlp.fc1.weight)


def test_which_phases_are_a_forward_and_a_backward_pass(cache: Path) -> None:
    possible = {}
    for name in METHODS:
        module, _ = built(small_config(name, cache))
        possible[name] = [can_be_bare(module, phase) for phase in module.method.phases()]
    assert possible["none"] == [True]
    assert all(all(possible[name]) for name in ("repa", "haste", "irepa"))
    # averaged weights in SRA, a token of its own in REG, a warm-up that stops early in ERW
    assert possible["sra"][0] is possible["erw"][0] is False
    assert possible["sra"][-1] is possible["erw"][-1] is True
    assert not any(possible["reg"])


def test_a_condition_that_loses_parts_is_whole(cache: Path) -> None:
    config = small_config("gmem", cache)
    module, data = built(config)
    loop = BareLoop(module, sgd(module), first_batch(config, data), nullcontext)
    assert module.backbone.y_embedder.dropped(2, torch.Generator()).ndim == 2
    assert torch.isfinite(loop._loss())


def test_the_phase_of_an_early_stop_has_no_bare_loop(cache: Path) -> None:
    config = small_config("erw", cache)
    module, data = built(config)
    with pytest.raises(ValueError, match="more than"):
        BareLoop(module, module.configure_optimizers(), first_batch(config, data), nullcontext)


def test_the_loops_take_turns_and_a_run_counts_its_own_steps(cache: Path) -> None:
    config = small_config("repa", cache, max_steps=5)
    module, data = built(config)
    clock = StepClock(warm_up=2, bare=True)
    trainer = make_trainer(config, callbacks=[clock])
    with quiet_lightning():
        trainer.fit(module, datamodule=data)
    # three steps after the warm-up, and a turn of the bare loop after each
    assert [len(each) for each in (clock.own.wall, clock.bare.wall, clock.own.cpu, clock.bare.cpu)] == [3] * 4
    assert trainer.global_step == 5
    expected = [
        (bare / own, bare_cpu / own_cpu)
        for bare, own, bare_cpu, own_cpu in zip(
            clock.bare.wall, clock.own.wall, clock.bare.cpu, clock.own.cpu, strict=True
        )
    ]
    assert clock.ratios() == expected


def test_ratios_and_utilisation_by_hand() -> None:
    line = Measured(
        name="line",
        rates=(10.0, 40.0, 20.0),
        bare_turns=((0.9, 1.0), (0.97, 0.8), (1.2, 0.99)),
        flops=3e9,
        peak_flops=6e11,
        products=(1e11, 1e12, 1e11),
    )
    assert (line.of_bare, line.of_bare_cpu) == (0.97, 0.99)
    # 20 images/s of 3 GFLOP are 0.06 TFLOP/s of 0.6
    assert line.utilisation == pytest.approx(0.1)
    # 0.3, 0.12, 0.6: not the median rate by the median product
    assert line.of_product == pytest.approx(0.3)
    nothing = Measured(name="nothing", rates=(1.0,))
    assert (nothing.of_bare, nothing.of_bare_cpu, nothing.utilisation, nothing.of_product) == (0, 0, 0, 0)


def test_flops_of_a_product_are_of_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(arithmetic.SIDE, "cpu", 10)
    # three products of 4, 2 and 3 seconds
    times = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(arithmetic.time, "perf_counter", lambda: next(times))
    assert product_flops(torch.device("cpu"), TrainConfig()) == 2 * 10**3 / 2


def test_no_peak_is_stated_of_a_cpu() -> None:
    assert known_peak(TrainConfig(), torch.device("cpu")) is None


def test_targets_are_chosen_by_name() -> None:
    assert BenchSettings(targets="cached,constant").measured_targets == ("constant targets", "cached")
    with pytest.raises(RepaError) as caught:
        BenchSettings(targets="cached,none")
    assert caught.value.field == "--targets"
