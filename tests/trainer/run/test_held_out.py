"""The held-out loss against a loop over rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from repa.data.format.columns import MOMENTS
from repa.data.reading.latents import LatentScale
from repa.data.reading.reader import CacheReader
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.run.held_out import CHUNK, held_out_batches, held_out_sums, held_out_times
from repa.trainer.step.latents import MomentLatents
from repa.trainer.step.randomness import generator_for

if TYPE_CHECKING:
    from pathlib import Path


def test_times_are_even_and_do_not_depend_on_the_chunk() -> None:
    times = held_out_times(0, 200)
    assert torch.equal(times[64:128], held_out_times(64, 64))
    assert 0 <= float(times.min()) < float(times.max()) < 1
    # golden-ratio sequences have low discrepancy: no gap is larger than a few times 1/N
    assert float(times.sort().values.diff().max()) < 3 / 200


def network(seed: int) -> SiT:
    torch.manual_seed(seed)
    model = SiT(SiTConfig(depth=1, width=16, heads=2, patch_size=2, input_size=4, num_classes=3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_held_out_loss_against_a_loop(cache: Path) -> None:
    networks = {"a": network(0), "b": network(1)}
    rows = np.array([3, 4, 9, 17, 30, 39])
    scale = LatentScale(0.3, 0.1)
    with CacheReader(cache, (MOMENTS,)) as reader:
        sums, count = held_out_sums(
            networks,
            held_out_batches(reader, rows, (MOMENTS,)),
            objective=Flow(FlowConfig(path="cosine")),
            latents=MomentLatents(scale),
            seed=5,
            device=torch.device("cpu"),
        )
        moments = np.empty((6, 8, 4, 4), np.float32)
        reader.read_rows(rows, (MOMENTS,), {MOMENTS: moments})
        labels = reader.labels[rows]
    assert count == 6
    generator = generator_for(5, "held out", 0)
    posterior, noise = (torch.randn(6, 4, 4, 4, generator=generator) for _ in range(2))
    for name, model in networks.items():
        total = 0.0
        for i in range(6):
            t = held_out_times(i, 1)
            mean, std = torch.from_numpy(moments[i, :4]), torch.from_numpy(moments[i, 4:])
            x0 = (mean + std * posterior[i] - 0.1) * 0.3
            angle = t * torch.pi / 2
            x_t = torch.cos(angle) * x0 + torch.sin(angle) * noise[i]
            target = torch.pi / 2 * (torch.cos(angle) * noise[i] - torch.sin(angle) * x0)
            velocity = model(x_t[None], t, torch.tensor([int(labels[i])])).prediction
            total += float((velocity - target).square().mean().detach())
        assert sums[name] == pytest.approx(total, rel=1e-5)
    assert sums["a"] != pytest.approx(sums["b"], rel=1e-3)


def test_ranks_share_the_chunks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CHUNK == 64
    monkeypatch.setattr("repa.trainer.run.held_out.CHUNK", 4)
    rows = np.array([0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])
    model = {"m": network(2)}

    def sums(rank: int, world: int) -> tuple[float, int]:
        with CacheReader(cache, (MOMENTS,)) as reader:
            totals, count = held_out_sums(
                model,
                held_out_batches(reader, rows, (MOMENTS,), rank=rank, world=world),
                objective=Flow(FlowConfig()),
                latents=MomentLatents(LatentScale(1.0)),
                seed=0,
                device=torch.device("cpu"),
            )
        return totals["m"], count

    parts = [sums(rank, 2) for rank in range(2)]
    whole = sums(0, 1)
    assert [count for _, count in parts] == [7, 4]
    assert sum(total for total, _ in parts) == pytest.approx(whole[0], rel=1e-12)
    assert whole[1] == 11
