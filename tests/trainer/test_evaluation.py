"""Fréchet distance against closed forms; the held-out loss against a loop over rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from repa.data.errors import RepaError
from repa.data.format.columns import MOMENTS
from repa.data.reading.latents import LatentScale
from repa.data.reading.reader import CacheReader
from repa.trainer.evaluation.frechet import frechet_distance
from repa.trainer.evaluation.registry import METRICS, Metric, measure
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.run.held_out import CHUNK, held_out_batches, held_out_sums, held_out_times
from repa.trainer.step.randomness import generator_for

if TYPE_CHECKING:
    from pathlib import Path

RANDOM = np.random.default_rng(0)


def test_equal_sets_have_no_distance() -> None:
    features = RANDOM.normal(size=(50, 7))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features[RANDOM.permutation(50)]) == pytest.approx(0, abs=1e-9)


def test_a_shift_costs_its_square() -> None:
    features = RANDOM.normal(size=(40, 5))
    shift = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    assert frechet_distance(features, features + shift) == pytest.approx(shift @ shift, rel=1e-9)


def test_a_scale_costs_the_difference_of_the_deviations() -> None:
    features = RANDOM.normal(size=(60, 6))
    features -= features.mean(axis=0)
    scales = np.array([1.0, 2.0, 0.5, 3.0, 1.5, 0.1])
    # decorrelated, so that the covariances commute: Σ (σ₁ − σ₂)²
    features = features @ np.linalg.inv(np.linalg.cholesky(np.cov(features.T)).T)
    expected = ((scales - 1) ** 2).sum()
    assert frechet_distance(features, features * scales) == pytest.approx(expected, rel=1e-9)


def test_one_channel() -> None:
    first, second = RANDOM.normal(1, 2, size=(30, 1)), RANDOM.normal(-1, 0.5, size=(20, 1))
    expected = (first.mean() - second.mean()) ** 2 + (first.std(ddof=1) - second.std(ddof=1)) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_against_the_eigenvalues_of_the_product() -> None:
    """tr (Σ₁Σ₂)^½ is also the sum of the roots of the eigenvalues of the unsymmetric product."""
    first, second = RANDOM.normal(size=(80, 6)), RANDOM.normal(size=(70, 6)) @ RANDOM.normal(size=(6, 6))
    covariances = np.cov(first.T), np.cov(second.T)
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real).sum()
    shift = first.mean(axis=0) - second.mean(axis=0)
    expected = shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_channels() -> None:
    first, second = RANDOM.normal(size=(5, 40)), RANDOM.normal(size=(6, 40)).astype(np.float32)
    distance = frechet_distance(first, second)
    assert np.isfinite(distance)
    assert distance > 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.zeros((1, 3)), np.zeros((4, 3))),
        (np.zeros((4, 3)), np.zeros((4, 2))),
        (np.zeros(4), np.zeros((4, 2))),
        (np.full((4, 2), np.nan), np.zeros((4, 2))),
    ],
)
def test_features_that_have_no_distance(first: np.ndarray, second: np.ndarray) -> None:
    with pytest.raises(ValueError, match="features"):
        frechet_distance(first, second)


def test_metrics_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"features": RANDOM.standard_normal((30, 4)), "reference": RANDOM.standard_normal((20, 4)) + 1}
    expected = frechet_distance(inputs["features"], inputs["reference"])
    assert measure("frechet", inputs) == expected > 1
    monkeypatch.setitem(METRICS, "spread", Metric(compute=lambda x: float(x.std()), needs=("features",)))
    assert measure("spread", inputs) == pytest.approx(inputs["features"].std())
    with pytest.raises(RepaError) as caught:
        measure("frechet", {"features": inputs["features"]})
    assert caught.value.field == "reference"
    with pytest.raises(RepaError):
        measure("fid", inputs)


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
            scale=scale,
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
                scale=LatentScale(1.0),
                seed=0,
                device=torch.device("cpu"),
            )
        return totals["m"], count

    parts = [sums(rank, 2) for rank in range(2)]
    whole = sums(0, 1)
    assert [count for _, count in parts] == [7, 4]
    assert sum(total for total, _ in parts) == pytest.approx(whole[0], rel=1e-12)
    assert whole[1] == 11
