"""Samplers: golden numbers, orders of convergence, guidance, determinism."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.objectives.paths import INTERPOLANTS, interpolant
from repa.trainer.sampling.sampler import integrate, model_velocity, sample, sample_noises
from repa.trainer.sampling.settings import SamplerConfig
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GOLDEN_INTERVAL = (0.0, 0.7)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "repa.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


FLOW = Flow(FlowConfig())


@pytest.fixture(scope="module")
def backbone(shared: Path) -> SiT:
    state = load_file(shared / "golden" / "repa_sit.safetensors")
    model = SiT(SiTConfig(depth=4, width=48, heads=4, patch_size=2, input_size=16)).double()
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("projectors.")})
    return model.eval()


@pytest.mark.parametrize("guidance", [1.0, 1.8])
@pytest.mark.parametrize(("solver", "heun"), [("euler", 0), ("heun", 1)])
def test_golden_ode(
    golden: dict[str, torch.Tensor], backbone: SiT, solver: str, heun: int, guidance: float
) -> None:
    samples = sample(
        backbone,
        FLOW,
        golden["sample_latents"],
        golden["sample_y"],
        SamplerConfig(solver=solver, steps=12, guidance=guidance, interval=GOLDEN_INTERVAL),
    )
    torch.testing.assert_close(samples, golden[f"ode_heun{heun}_cfg{guidance}"], rtol=0, atol=1e-9)


def test_golden_sde(golden: dict[str, torch.Tensor], backbone: SiT) -> None:
    samples = sample(
        backbone,
        FLOW,
        golden["sample_latents"],
        golden["sample_y"],
        SamplerConfig(solver="sde", steps=12, guidance=1.8, interval=GOLDEN_INTERVAL),
        noises=golden["sde_noise"],
    )
    torch.testing.assert_close(samples, golden["sde_cfg1.8"], rtol=0, atol=1e-9)


def gaussian(name: str, s: float) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Marginal velocity of data N(0, s²): x_t is N(0, α²s² + σ²)."""
    path = interpolant(name)

    def velocity(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        del condition
        a, b, da, db = (
            f(t)[:, None, None, None] for f in (path.alpha, path.sigma, path.alpha_rate, path.sigma_rate)
        )
        return (da * a * s**2 + db * b) / (a**2 * s**2 + b**2) * x

    return velocity


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("name", sorted(INTERPOLANTS))
def test_order_of_convergence_to_the_exact_flow(name: str, solver: str, order: int) -> None:
    """The flow of N(0, s²) scales noise by s."""
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    labels = torch.zeros(4, dtype=torch.int64)
    errors = [
        (
            integrate(gaussian(name, 0.5), x, labels, labels, SamplerConfig(solver=solver, steps=steps))
            - 0.5 * x
        )
        .abs()
        .max()
        .item()
        for steps in (64, 128)
    ]
    # Heun's last step is Euler's: one local error of second order, so second order in all
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("solver", "steps"), [("sde", 200), ("sde-heun", 50)])
@pytest.mark.parametrize("name", sorted(INTERPOLANTS))
def test_sde_samples_have_the_data_variance(name: str, solver: str, steps: int) -> None:
    x = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.zeros(len(x), dtype=torch.int64)
    samples = integrate(
        gaussian(name, 0.5),
        x,
        labels,
        labels,
        SamplerConfig(solver=solver, steps=steps),
        path=interpolant(name),
        generator=torch.Generator().manual_seed(1),
    )
    # 1.5 % is the discretisation and the sampling error of 20,000 draws
    assert samples.std().item() == pytest.approx(0.5, rel=0.015)
    # the deterministic flow would give 1
    assert abs(torch.corrcoef(torch.stack([samples.flatten(), x.flatten()]))[0, 1]) < 0.6


@pytest.mark.parametrize(
    ("solver", "evaluations"), [("euler", 10), ("heun", 19), ("sde", 10), ("sde-heun", 19)]
)
def test_rows_of_the_forward_passes(solver: str, evaluations: int) -> None:
    """Only inside the interval does the unconditional pass run, and in the same call."""
    rows: list[tuple[float, int]] = []

    def velocity(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        assert len(x) == len(t) == len(condition)
        assert len(set(t.tolist())) == 1
        if len(x) == 6:
            assert condition.tolist() == [0, 1, 2, 9, 9, 9]
            assert torch.equal(x[:3], x[3:])
        rows.append((t[0].item(), len(x)))
        return x

    config = SamplerConfig(solver=solver, steps=10, guidance=2.0, interval=(0.25, 0.65))
    labels, null = torch.arange(3), torch.full((3,), 9)
    integrate(velocity, torch.randn(3, 1, 2, 2), labels, null, config, generator=torch.Generator())
    assert len(rows) == evaluations
    if solver == "heun":
        # both evaluations of a step are guided when the step begins inside
        starts = [t for t in config.times()[:-1] for _ in range(2)][:-1]
        assert [n for _, n in rows] == [6 if 0.25 <= t <= 0.65 else 3 for t in starts]
    else:
        times = config.times()[:-1]
        if solver == "sde-heun":
            # each evaluation by its own time
            times = [time for pair in pairwise(times) for time in pair] + times[-1:]
        assert rows == [(t, 6 if 0.25 <= t <= 0.65 else 3) for t in times]
    rows.clear()
    integrate(velocity, torch.randn(3, 1, 2, 2), labels, null, SamplerConfig(steps=10, interval=(0.25, 0.65)))
    assert {n for _, n in rows} == {3}


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    def velocity(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return condition.double()[:, None, None, None].expand_as(x)

    x = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    config = SamplerConfig(steps=4, guidance=3.0)
    out = integrate(velocity, x, torch.tensor([2, 5]), torch.tensor([1, 1]), config)
    # constant slope 1 + 3·(c − 1) from t = 1 to 0
    torch.testing.assert_close(out.flatten(), torch.tensor([-4.0, -13.0], dtype=torch.float64))


def test_guided_drift_of_the_sde_by_hand() -> None:
    """One noisy step and the last one, written out with the score −(x + (1 − t)·v) / t of the linear path."""

    def v(x: torch.Tensor, c: float) -> torch.Tensor:
        return c * x

    def drift(x: torch.Tensor, t: float, c: float) -> torch.Tensor:
        return v(x, c) + t * (x + (1 - t) * v(x, c)) / t

    x0 = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    noise = torch.randn_like(x0)
    x = x0 - 0.96 * (drift(x0, 1, 2) + 1.5 * (drift(x0, 1, 3) - drift(x0, 1, 2))) + (2 * 0.96) ** 0.5 * noise
    x = x - 0.04 * (drift(x, 0.04, 2) + 1.5 * (drift(x, 0.04, 3) - drift(x, 0.04, 2)))

    def velocity(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return condition[:, None, None, None] * x

    config = SamplerConfig(solver="sde", steps=2, guidance=1.5)
    out = integrate(velocity, x0, torch.tensor([3]), torch.tensor([2]), config, noises=[noise])
    torch.testing.assert_close(out, x)


def test_the_state_is_float64_and_the_model_sees_its_own_dtype() -> None:
    model = (
        SiT(SiTConfig(depth=1, width=16, heads=1, patch_size=2, input_size=4, num_classes=3))
        .bfloat16()
        .eval()
    )
    seen = []
    forward = model.forward

    def spy(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> object:
        seen.append((x.dtype, t.dtype))
        return forward(x, t, condition)

    model.forward = spy  # type: ignore[method-assign]
    out = sample(model, FLOW, torch.randn(2, 4, 4, 4), torch.tensor([0, 1]), SamplerConfig(steps=2))
    assert out.dtype == torch.float64
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert (
        model_velocity(model, FLOW)(torch.randn(1, 4, 4, 4), torch.ones(1), torch.tensor([0])).dtype
        == torch.float64
    )


def test_a_sample_does_not_depend_on_its_batch() -> None:
    shape = (1, 2, 2)
    labels = torch.zeros(4, dtype=torch.int64)

    def run(samples: list[int]) -> torch.Tensor:
        noises = sample_noises(7, samples, shape)
        count = len(samples)
        config = SamplerConfig(solver="sde", steps=5)
        return integrate(
            gaussian("linear", 0.5), next(noises), labels[:count], labels[:count], config, noises=noises
        )

    whole = run([0, 1, 2, 3])
    assert torch.equal(whole[2:], run([2, 3]))
    assert torch.equal(whole[1:2], run([1]))
    assert len({float(value) for value in whole[:, 0, 0, 0]}) == 4
    assert not torch.equal(next(sample_noises(7, [0], shape)), next(sample_noises(8, [0], shape)))


def test_progress_counts_the_steps() -> None:
    labels = torch.zeros(1, dtype=torch.int64)
    for solver in ("euler", "heun", "sde", "sde-heun"):
        done: list[int] = []
        config = SamplerConfig(solver=solver, steps=3)
        x = torch.randn(1, 1, 2, 2)
        integrate(
            gaussian("linear", 1),
            x,
            labels,
            labels,
            config,
            generator=torch.Generator(),
            progress=done.append,
        )
        assert done == [1, 2, 3]


def test_the_sde_needs_its_noises() -> None:
    labels = torch.zeros(1, dtype=torch.int64)
    x = torch.randn(1, 1, 2, 2)
    config = SamplerConfig(solver="sde", steps=5)
    with pytest.raises(ValueError, match="noises or a generator"):
        integrate(gaussian("linear", 1), x, labels, labels, config)
    with pytest.raises(ValueError, match="5 SDE steps take 4"):
        integrate(gaussian("linear", 1), x, labels, labels, config, noises=[x, x, x])


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"solver": "dopri5"}, "euler, heun, sde"),
        ({"steps": 0}, "take 1 or more"),
        ({"solver": "sde", "steps": 1}, "take 2 or more"),
        ({"interval": (0.7, 0.2)}, "low ≤ high"),
        ({"interval": (0.0, 1.5)}, "inside"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], what: str) -> None:
    with pytest.raises(RepaError, match=what):
        SamplerConfig(**settings)  # type: ignore[arg-type]
