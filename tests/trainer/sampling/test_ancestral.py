"""Ancestral steps and DDIM: golden samples, the closed form of a Gaussian, guidance, refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import small_dit as small
import torch
from repa.data.errors import RepaError
from repa.trainer.models.capture import Captured
from repa.trainer.models.conditioning import LabelConditioner
from repa.trainer.models.dit import DiT
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.models.timesteps import step_of
from repa.trainer.objectives.ddpm import Ddpm, DdpmConfig
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.sampling.sampler import sample, sample_noises
from repa.trainer.sampling.settings import SamplerConfig
from torch.testing import assert_close

if TYPE_CHECKING:
    from pathlib import Path

DDPM = Ddpm(DdpmConfig())
LATENT = (4, 16, 16)


@pytest.fixture(scope="module")
def reference(shared: Path) -> small.Reference:
    return small.load(shared)


@pytest.mark.parametrize(
    ("name", "solver", "guidance", "channels"),
    [
        ("ddpm_cfg1.0", "ddpm", 1.0, "all"),
        ("ddpm_cfg4.0_three", "ddpm", 4.0, "three"),
        ("ddpm_cfg4.0_all", "ddpm", 4.0, "all"),
        ("ddim_cfg1.0", "ddim", 1.0, "all"),
        ("ddim_cfg4.0_three", "ddim", 4.0, "three"),
    ],
)
def test_golden(reference: small.Reference, name: str, solver: str, guidance: float, channels: str) -> None:
    numbers = reference.numbers
    settings = SamplerConfig(solver=solver, steps=10, guidance=guidance, guidance_channels=channels)
    noises = numbers["sample_noise"] if solver == "ddpm" else None
    found = sample(
        reference.student, DDPM, numbers["sample_xT"], numbers["sample_y"], settings, noises=noises
    )
    assert found.dtype == torch.float64
    assert_close(found, numbers[name], rtol=1e-9, atol=1e-9)


def test_the_released_tables_in_float32_are_near(reference: small.Reference) -> None:
    """What the unmodified program gives differs by its rounding, and by nothing else."""
    numbers = reference.numbers
    for name, channels, guidance in (("ddpm_cfg1.0", "all", 1.0), ("ddpm_cfg4.0_three", "three", 4.0)):
        settings = SamplerConfig(steps=10, guidance=guidance, guidance_channels=channels)
        found = sample(
            reference.student,
            DDPM,
            numbers["sample_xT"],
            numbers["sample_y"],
            settings,
            noises=numbers["sample_noise"],
        )
        assert_close(found, numbers[f"{name}_f32"], rtol=1e-4, atol=1e-3)


class Gaussian(torch.nn.Module):
    """The best network of data N(mean, s²): it knows E[ε | x_t] in closed form, and says v = −1."""

    def __init__(self, mean: float, s: float) -> None:
        super().__init__()
        self.mean, self.s = mean, s
        self.config = SiTConfig(depth=1, width=4, heads=1, patch_size=1, input_size=2)
        self.y_embedder = LabelConditioner(3, 4)
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> Captured:
        step = step_of(t)
        self.seen.append(int(step[0]))
        alpha, sigma = (table[step][:, None, None, None] for table in (DDPM.chain.alpha, DDPM.chain.sigma))
        variance = (alpha * self.s).square() + sigma.square()
        noise = sigma * (x - alpha * self.mean) / variance
        return Captured(prediction=torch.cat([noise, torch.full_like(noise, -1.0)], dim=1))


def test_ddim_carries_a_gaussian_to_its_data() -> None:
    """DDIM's flow of a Gaussian is affine; with all steps it ends at mean + s·x."""
    network, x = Gaussian(0.5, 0.7), torch.randn(64, 4, 2, 2, dtype=torch.float64)
    labels = torch.zeros(64, dtype=torch.int64)
    errors = []
    for steps in (50, 200, 800):
        found = sample(network, DDPM, x, labels, SamplerConfig(solver="ddim", steps=steps))
        errors.append((found - (0.5 + 0.7 * x)).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_ancestral_steps_have_the_variance_of_the_data() -> None:
    network = Gaussian(0.5, 0.7)
    labels = torch.zeros(1024, dtype=torch.int64)
    found = sample(
        network,
        DDPM,
        torch.randn(1024, 4, 2, 2, dtype=torch.float64),
        labels,
        SamplerConfig(solver="ddpm", steps=200),
        generator=torch.Generator().manual_seed(0),
    )
    assert found.mean().item() == pytest.approx(0.5, abs=0.03)
    assert found.std().item() == pytest.approx(0.7, rel=0.05)
    # the network is told the original steps, from the noisy end
    assert network.seen[:2] == [999, 994]
    assert network.seen[-1] == 0


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_guidance_acts_in_its_interval_and_leaves_the_variance(solver: str) -> None:
    network = Gaussian(0.0, 1.0)
    rows: list[int] = []
    forward = network.forward

    def count(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> Captured:
        rows.append(len(x))
        captured = forward(x, t, condition)
        assert captured.prediction is not None
        noise, variance = captured.prediction.chunk(2, dim=1)
        # another answer without a label: a wrong half of v would be seen
        without = (condition == 3)[:, None, None, None]
        return Captured(prediction=torch.cat([noise, torch.where(without, 50.0, variance)], dim=1))

    network.forward = count  # type: ignore[method-assign]
    x, labels = torch.randn(2, 4, 2, 2, dtype=torch.float64), torch.tensor([0, 1])
    noises = list(torch.randn(9, 2, 4, 2, 2, dtype=torch.float64))

    def run(**settings: Any) -> torch.Tensor:
        return sample(
            network, DDPM, x, labels, SamplerConfig(solver=solver, steps=10, **settings), noises=noises
        )

    plain = run()
    assert rows == [2] * 10
    rows.clear()
    # both passes say the same noise, so guidance changes nothing
    assert_close(run(guidance=3.0, interval=(0.3, 0.7)), plain)
    assert rows == [2, 2, 2, 4, 4, 4, 4, 2, 2, 2]


def test_one_step_is_the_guess_of_the_clean_latent() -> None:
    network, x = Gaussian(0.0, 1.0), torch.randn(2, 4, 2, 2, dtype=torch.float64)
    labels = torch.tensor([0, 1])
    found = sample(network, DDPM, x, labels, SamplerConfig(solver="ddim", steps=1))
    alpha, sigma = DDPM.chain.alpha[-1], DDPM.chain.sigma[-1]
    assert_close(found, (x - sigma * sigma * x) / alpha)
    assert network.seen == [999]


def test_noises_are_counted() -> None:
    network, x = Gaussian(0.0, 1.0), torch.randn(2, 4, 2, 2, dtype=torch.float64)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="noises or a generator"):
        sample(network, DDPM, x, labels, SamplerConfig(steps=3))
    with pytest.raises(ValueError, match="take 2"):
        sample(network, DDPM, x, labels, SamplerConfig(steps=3), noises=[x])
    steps: list[int] = []
    noises = sample_noises(0, range(2), (4, 2, 2))
    sample(network, DDPM, x, labels, SamplerConfig(steps=3), noises=noises, progress=steps.append)
    assert steps == [1, 2, 3]


def test_the_float32_network_is_sampled_in_float64(reference: small.Reference) -> None:
    network = DiT(small.CONFIG)
    network.load_state_dict(reference.student.state_dict())
    numbers = reference.numbers
    settings = SamplerConfig(solver="ddim", steps=10)
    found = sample(network.eval(), DDPM, numbers["sample_xT"], numbers["sample_y"], settings)
    assert found.dtype == torch.float64
    scale = numbers["ddim_cfg1.0"].abs().max()
    assert ((found - numbers["ddim_cfg1.0"]).abs().max() / scale) < 1e-4


def test_a_solver_of_another_objective_is_refused() -> None:
    x, labels = torch.randn(1, 4, 4, 4), torch.tensor([0])
    plain = SiT(SiTConfig(depth=1, width=16, heads=1, patch_size=2, input_size=4, num_classes=3))
    for network, objective, solvers in (
        (Gaussian(0.0, 1.0), DDPM, ("euler", "heun", "sde")),
        (plain, Flow(FlowConfig()), ("ddpm", "ddim")),
    ):
        for solver in solvers:
            with pytest.raises(RepaError) as caught:
                sample(network, objective, x, labels, SamplerConfig(solver=solver))
            assert caught.value.field == "--solver"
            assert caught.value.remedy


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_there_are_a_thousand_steps(solver: str) -> None:
    SamplerConfig(solver=solver, steps=1000)
    for settings in (SamplerConfig(steps=1001), None):
        with pytest.raises(RepaError) as caught:
            settings.of(DDPM) if settings else SamplerConfig(solver=solver, steps=1001)
        assert caught.value.field == "--steps"


def test_three_channels_of_a_flow() -> None:
    """The original SiT's samplers guide the first three channels too."""
    torch.manual_seed(0)
    config = SiTConfig(depth=1, width=16, heads=1, patch_size=2, input_size=4, num_classes=3)
    network = SiT(config).double()
    torch.nn.init.normal_(network.final_layer.linear.weight)
    torch.nn.init.normal_(network.blocks[0].adaLN_modulation[1].weight)
    x, labels = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.tensor([0, 1])

    def run(**settings: Any) -> torch.Tensor:
        return sample(network, Flow(FlowConfig()), x, labels, SamplerConfig(steps=1, **settings))

    plain, every, three = run(), run(guidance=2.5), run(guidance=2.5, guidance_channels="three")
    assert_close(three[:, :3], every[:, :3])
    assert_close(three[:, 3:], plain[:, 3:])
    assert not torch.allclose(every[:, 3:], plain[:, 3:])
    assert torch.equal(run(guidance_channels="three"), plain)
