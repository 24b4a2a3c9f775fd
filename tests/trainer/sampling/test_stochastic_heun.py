"""Stochastic Heun and shifted times, by hand and by what they cost."""

from __future__ import annotations

import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer.objectives.paths import Linear
from repa.trainer.sampling.sampler import integrate
from repa.trainer.sampling.settings import SamplerConfig
from repa.trainer.sampling.stochastic_heun import stochastic_heun_step

LABELS = torch.zeros(1, dtype=torch.int64)


def test_a_step_by_hand() -> None:
    """With d = c·x everything is a product."""
    x, noise, c, t, t_next = torch.tensor([2.0]), torch.tensor([-1.0]), 0.3, 0.8, 0.5
    noisy = 2.0 - (2 * 0.8 * 0.3) ** 0.5
    h = t - t_next
    expected = noisy * (1 - h * (c + c * (1 - h * c)) / 2)
    found = stochastic_heun_step(lambda state, time: c * state, x, t, t_next, noise)
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_fifty_times_take_99_evaluations(guidance: float) -> None:
    """The released code calls its network 198 times, for velocity and score one after the other."""
    times: list[float] = []

    def velocity(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        times.append(t[0].item())
        return x

    config = SamplerConfig(solver="sde-heun", steps=50, guidance=guidance)
    integrate(velocity, torch.randn(1, 1, 2, 2), LABELS, LABELS, config, generator=torch.Generator())
    assert len(times) == 99
    grid = config.times()
    assert (grid[0], grid[-2], grid[-1]) == (1.0, pytest.approx(0.004), 0.0)
    assert times[0] == 1
    assert times[1::2] == times[2::2] == grid[1:-1]


def test_it_follows_the_drift_to_second_order() -> None:
    """Without noise the steps integrate d = v − t·s of data N(0, s²) as Heun does."""

    def velocity(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        del condition
        time = t[:, None, None, None]
        return ((time - 1) * 0.25 + time) / ((1 - time) ** 2 * 0.25 + time**2) * x

    def end(steps: int) -> float:
        x, silent = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1)
        config = SamplerConfig(solver="sde-heun", steps=steps)
        out = integrate(velocity, x, LABELS, LABELS, config, path=Linear(), noises=[silent] * steps)
        return out.item()

    exact = end(4_000)
    errors = [abs(end(steps) - exact) for steps in (100, 200)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


def test_shifted_times() -> None:
    """By s' = a·s / (1 + (a − 1)·s) with s = 1 − t."""
    plain = SamplerConfig(steps=6).times()
    shifted = SamplerConfig(steps=6, shift=0.3).times()
    for t, found in zip(plain, shifted, strict=True):
        s = 1 - t
        assert found == pytest.approx(1 - 0.3 * s / (1 - 0.7 * s), abs=1e-12)
    assert (shifted[0], shifted[-1]) == (1, 0)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("inf"), float("nan")])
def test_shifts_that_are_none(shift: float) -> None:
    with pytest.raises(RepaError) as caught:
        SamplerConfig(shift=shift)
    assert caught.value.field == "--shift"


@pytest.mark.parametrize("solver", ["sde", "sde-heun"])
def test_the_solvers_that_draw_noise_have_their_own_times(solver: str) -> None:
    with pytest.raises(RepaError) as caught:
        SamplerConfig(solver=solver, shift=0.3)
    assert caught.value.field == "--shift"
