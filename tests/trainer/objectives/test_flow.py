"""Paths, scores, time laws and the velocity loss: golden numbers and closed forms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives.base import squared_error
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.objectives.paths import INTERPOLANTS, interpolant
from repa.trainer.objectives.times import TIME_LAWS, TimeLaw, lognormal_times, shifted, time_law
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

PATHS = sorted(INTERPOLANTS)


@pytest.mark.parametrize("name", PATHS)
def test_golden_velocity_loss(shared: Path, name: str) -> None:
    with np.load(shared / "golden" / "repa.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file}
    state = load_file(shared / "golden" / "repa_sit.safetensors")
    model = SiT(SiTConfig(depth=4, width=48, heads=4, patch_size=2, input_size=16)).double()
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("projectors.")})
    path, t = interpolant(name), golden["t"]
    x = path.interpolate(golden["x0"], golden["noise"], t)
    if name == "linear":
        torch.testing.assert_close(x, golden["fwd_x"], rtol=0, atol=1e-12)
    velocity = model(x, t, golden["y"]).prediction
    loss = squared_error(velocity, path.velocity(golden["x0"], golden["noise"], t))
    torch.testing.assert_close(loss, golden[f"loss_{name}_denoise"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_ends_and_derivatives(name: str) -> None:
    path = interpolant(name)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.alpha(ends), torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(path.sigma(ends), torch.tensor([0.0, 1.0], dtype=torch.float64))
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64, requires_grad=True)
    (alpha_rate,) = torch.autograd.grad(path.alpha(t).sum(), t)
    (sigma_rate,) = torch.autograd.grad(path.sigma(t).sum(), t)
    torch.testing.assert_close(path.alpha_rate(t).detach(), alpha_rate)
    torch.testing.assert_close(path.sigma_rate(t).detach(), sigma_rate)


def test_linear_velocity_is_noise_minus_data() -> None:
    x0, noise = torch.randn(2, 3, 2, 4, 4)
    t = torch.rand(3)
    assert torch.equal(interpolant("linear").velocity(x0, noise, t), noise - x0)


@pytest.mark.parametrize("name", PATHS)
def test_score_of_a_gaussian(name: str) -> None:
    """Data N(0, s²): x_t is N(0, α²s² + σ²), its score and marginal velocity are known in closed form."""
    path, s = interpolant(name), 0.7
    x = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.04, 0.2, 0.5, 0.7, 0.96, 1.0], dtype=torch.float64)
    a, b, da, db = (
        f(t)[:, None, None, None] for f in (path.alpha, path.sigma, path.alpha_rate, path.sigma_rate)
    )
    variance = a**2 * s**2 + b**2
    velocity = (da * a * s**2 + db * b) / variance * x
    torch.testing.assert_close(path.score(velocity, x, t), -x / variance)


@pytest.mark.parametrize("name", PATHS)
def test_score_of_one_image_points_back_along_its_noise(name: str) -> None:
    path = interpolant(name)
    x0, noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.01, 0.3, 0.6, 1.0], dtype=torch.float64)
    score = path.score(path.velocity(x0, noise, t), path.interpolate(x0, noise, t), t)
    torch.testing.assert_close(score, -noise / path.sigma(t)[:, None, None, None], rtol=1e-9, atol=1e-9)


def test_uniform_times() -> None:
    draws = time_law("uniform")(20_000, interpolant("cosine"), torch.Generator().manual_seed(0))
    assert draws.dtype == torch.float32
    assert 0 <= draws.min() < 1e-3
    assert 0.999 < draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", PATHS)
def test_lognormal_times_have_lognormal_noise_to_signal(name: str) -> None:
    path = interpolant(name)
    draws = time_law("lognormal")(20_000, path, torch.Generator().manual_seed(0)).double()
    normal = (path.sigma(draws) / path.alpha(draws)).log()
    assert normal.mean().item() == pytest.approx(0, abs=0.03)
    assert normal.std().item() == pytest.approx(1, abs=0.03)
    # the median ratio 1 lies in the middle of both paths
    assert draws.median().item() == pytest.approx(0.5, abs=0.01)


def test_times_are_a_function_of_the_generator() -> None:
    for law in TIME_LAWS.values():
        first, second = (law(5, interpolant("linear"), torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second)


@given(st.floats(0.01, 100), st.floats(0.001, 0.999))
def test_shifted_times_have_noise_over_signal_times_a_constant(shift: float, t: float) -> None:
    path, times = interpolant("linear"), torch.tensor([t], dtype=torch.float64)
    moved = shifted(times, shift)
    ratios = [path.sigma(each) / path.alpha(each) for each in (times, moved)]
    torch.testing.assert_close(ratios[1], ratios[0] / shift)
    torch.testing.assert_close(shifted(moved, 1 / shift), times)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(shifted(ends, shift), ends)
    assert shifted(torch.tensor([1 - 2**-24]), shift).item() <= 1


def test_the_objective_shifts_times_of_its_own_law_alone() -> None:
    def times(law: TimeLaw | None = None, **settings: Any) -> torch.Tensor:
        return Flow(FlowConfig(**settings)).times(64, torch.Generator().manual_seed(5), law)

    plain = times(times="lognormal")
    assert torch.equal(times(times="lognormal", shift=1.0), plain)
    # twice as much noise over signal, as in SD3's formula with a shift of 2
    torch.testing.assert_close(times(times="lognormal", shift=0.5), 2 * plain / (1 + plain))
    assert torch.equal(times(lognormal_times, shift=0.5), times(lognormal_times))


def test_the_error_is_the_mean_per_sample_in_float32() -> None:
    target = torch.full((2, 4, 8, 8), 300.0, dtype=torch.float16)
    loss = squared_error(torch.zeros_like(target), target)
    assert loss.dtype == torch.float32
    # 300² overflows float16
    assert loss.tolist() == [90_000.0, 90_000.0]
    a, b = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 2))
    slow = [
        math.fsum((x - y) ** 2 for x, y in zip(a[i].flat, b[i].flat, strict=True)) / a[i].size
        for i in range(3)
    ]
    np.testing.assert_allclose(squared_error(torch.from_numpy(a), torch.from_numpy(b)), slow, rtol=1e-14)


def test_unknown_names() -> None:
    with pytest.raises(RepaError, match="cosine"):
        interpolant("quadratic")
    with pytest.raises(RepaError, match="lognormal"):
        time_law("beta")
