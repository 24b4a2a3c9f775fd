"""DDPM's loss and chain: golden numbers, closed forms, precision, edges."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import small_dit as small
import torch
from hypothesis import given
from hypothesis import strategies as st
from repa.trainer.models.capture import Captured
from repa.trainer.models.timesteps import STEPS, step_of, time_of
from repa.trainer.objectives.chain import even_steps
from repa.trainer.objectives.ddpm import Ddpm, DdpmConfig, log_variance_of
from repa.trainer.objectives.times import lognormal_times
from torch.testing import assert_close

if TYPE_CHECKING:
    from pathlib import Path

    from repa.trainer.objectives.base import Noised

OBJECTIVE = Ddpm(DdpmConfig())


@pytest.fixture(scope="module")
def reference(shared: Path) -> small.Reference:
    return small.load(shared)


def noised_of(reference: small.Reference) -> Noised:
    numbers = reference.numbers
    return OBJECTIVE.noised(numbers["x0"], numbers["noise"], time_of(numbers["t"].double()))


def test_golden_loss_and_gradients(reference: small.Reference) -> None:
    numbers, student = reference.numbers, reference.student
    noised = noised_of(reference)
    assert_close(noised.x_t, numbers["x_t"], **small.TOLERANCE)
    captured = student(noised.x_t, noised.t, numbers["y"])
    assert_close(captured.prediction, numbers["out"], **small.TOLERANCE)
    losses = OBJECTIVE.losses(captured, noised)
    assert tuple(losses) == OBJECTIVE.terms
    assert_close(losses["mse"], numbers["mse"], rtol=1e-12, atol=1e-9)
    assert_close(losses["vb"], numbers["vb"], rtol=1e-12, atol=1e-9)
    weights = [student.final_layer.linear.weight, student.blocks[0].attn.proj.weight]
    for name, value in (("vb", losses["vb"].mean()), ("loss", (losses["mse"] + losses["vb"]).mean())):
        gradients = torch.autograd.grad(value, weights, retain_graph=True)
        for found, part in zip(gradients, ("final", "proj"), strict=True):
            assert_close(found, numbers[f"grad_{name}_{part}"], rtol=1e-9, atol=1e-9)
    # the bound moves nothing that predicts the noise: the first half of the channels of each pixel
    (gradient,) = torch.autograd.grad(losses["vb"].mean(), weights[:1])
    rows = gradient.reshape(2, 2, 8, 48)
    assert not rows[:, :, :4].any()
    assert rows[:, :, 4:].any()


def test_golden_gaussian_of_the_network(reference: small.Reference) -> None:
    numbers, chain = reference.numbers, OBJECTIVE.chain
    noise, variance = OBJECTIVE.split(numbers["out"])
    steps = numbers["t"]
    assert_close(log_variance_of(chain, variance, steps), numbers["p_log_variance"], rtol=1e-12, atol=1e-9)
    alpha, sigma, clean, state = (
        table[steps][:, None, None, None]
        for table in (chain.alpha, chain.sigma, chain.weight_of_clean, chain.weight_of_state)
    )
    x0 = (numbers["x_t"] - sigma * noise) / alpha
    assert_close(x0, numbers["pred_xstart"], rtol=1e-12, atol=1e-9)
    assert_close(clean * x0 + state * numbers["x_t"], numbers["p_mean"], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("count", [10, 250])
def test_golden_steps(reference: small.Reference, count: int) -> None:
    assert even_steps(count, STEPS) == reference.numbers[f"respaced_{count}"].tolist()


def test_golden_betas_of_fewer_steps(reference: small.Reference) -> None:
    chain = OBJECTIVE.chain.only(even_steps(10, STEPS))
    assert_close(chain.betas, reference.numbers["respaced_10_betas"], rtol=1e-12, atol=0)
    assert chain.steps == tuple(reference.numbers["respaced_10"].tolist())
    # those of the published "ddim50", every twentieth, are another choice of steps of the same chain
    every = OBJECTIVE.chain.only(reference.numbers["respaced_ddim50"].tolist())
    assert_close(every.signal, OBJECTIVE.chain.signal[::20])


def test_the_chain_in_numbers_of_the_paper() -> None:
    chain = OBJECTIVE.chain
    assert chain.signal[0].item() == pytest.approx(0.9999, abs=1e-12)
    assert chain.signal[-1].item() == pytest.approx(4.0e-5, rel=0.02)
    assert (1 / chain.alpha[-1]).item() == pytest.approx(157, abs=1)
    # equal parts of data and noise
    assert int((chain.alpha - chain.sigma).abs().argmin()) in (258, 259)
    assert all(table.dtype == torch.float64 for table in (chain.alpha, chain.log_least, chain.betas))


@given(count=st.integers(1, STEPS))
def test_fewer_steps_keep_the_signal_and_both_ends(count: int) -> None:
    steps = even_steps(count, STEPS)
    assert len(set(steps)) == count
    assert steps == sorted(steps)
    assert steps[-1] == STEPS - 1
    assert count == 1 or steps[0] == 0
    chain = OBJECTIVE.chain.only(steps)
    assert_close(chain.signal, OBJECTIVE.chain.signal[steps], rtol=1e-9, atol=0)
    assert torch.isfinite(torch.stack([chain.log_least, chain.log_most])).all()
    assert len(chain) == count


def test_all_steps_are_the_chain_itself() -> None:
    whole = OBJECTIVE.chain.only(even_steps(STEPS, STEPS))
    assert_close(whole.betas, OBJECTIVE.chain.betas, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_step_has_a_time_of_its_own(dtype: torch.dtype) -> None:
    steps = torch.arange(STEPS)
    assert torch.equal(step_of(time_of(steps.to(dtype))), steps)
    assert step_of(torch.tensor([0.0, 1.0, 0.0009999, 0.5])).tolist() == [0, 999, 0, 500]
    assert step_of(torch.tensor(time_of(7.0))) == 7


def test_times_are_uniform_over_the_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    t = OBJECTIVE.times(200_000, generator)
    counts = torch.bincount(step_of(t), minlength=STEPS)
    assert (t.dtype, counts.min() > 120, counts.max() < 290) == (torch.float32, True, True)
    # a law of the method's is that of the linear path
    generator = torch.Generator().manual_seed(0)
    drawn = OBJECTIVE.times(1000, generator, lognormal_times)
    assert 0.45 < float((drawn < 0.5).float().mean()) < 0.55


def test_the_bound_by_torchs_own_divergence() -> None:
    """KL of two Gaussians whose means go the long way, by x₀."""
    torch.manual_seed(0)
    x0, noise, guess, variance = torch.randn(4, 3, 4, 2, 2, dtype=torch.float64)
    steps = torch.tensor([1, 500, 999])
    noised = OBJECTIVE.noised(x0, noise, time_of(steps.double()))
    found = OBJECTIVE.losses(Captured(prediction=torch.cat([guess, variance], dim=1)), noised)["vb"]
    chain = OBJECTIVE.chain
    for row, step in enumerate(steps.tolist()):
        x = noised.x_t[row]
        clean, state = chain.weight_of_clean[step], chain.weight_of_state[step]
        before = chain.signal[step - 1]
        least = chain.betas[step] * (1 - before) / (1 - chain.signal[step])
        fraction = (variance[row] + 1) / 2
        log_variance = fraction * chain.betas[step].log() + (1 - fraction) * least.log()
        guessed = (x - chain.sigma[step] * guess[row]) / chain.alpha[step]
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Normal(clean * x0[row] + state * x, least.sqrt()),
            torch.distributions.Normal(clean * guessed + state * x, torch.exp(0.5 * log_variance)),
        )
        assert found[row].item() == pytest.approx(divergence.mean().item() / math.log(2), rel=1e-9)


def test_the_perfect_network_pays_nothing_but_at_the_last_step() -> None:
    x0, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    t = time_of(torch.tensor([0.0, 400.0, 999.0], dtype=torch.float64))
    prediction = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)
    losses = OBJECTIVE.losses(Captured(prediction=prediction), OBJECTIVE.noised(x0, noise, t))
    assert not losses["mse"].any()
    assert_close(losses["vb"][1:], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert losses["vb"][0] > 0


def test_bins_are_open_beyond_one() -> None:
    """At step 0 a latent far outside ±1 costs nothing where the mean lies at it, and ±1 is shared out."""
    x0 = torch.tensor([-5.0, 5.0, 0.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    noise = torch.zeros_like(x0)
    noised = OBJECTIVE.noised(x0, noise, torch.zeros(3, dtype=torch.float64))
    prediction = torch.cat([noise, torch.full_like(noise, 1.0)], dim=1)
    bits = OBJECTIVE.losses(Captured(prediction=prediction), noised)["vb"]
    sd = math.sqrt(OBJECTIVE.chain.betas[0].item())
    # open to one side: the bin reaches from half a bin beyond the mean to infinity
    half = 1 / 255
    open_ended = 0.5 * (1 + math.erf(half / sd / math.sqrt(2)))
    closed = math.erf(half / sd / math.sqrt(2))
    expected = [-math.log2(open_ended), -math.log2(open_ended), -math.log2(closed)]
    assert bits.tolist() == pytest.approx(expected, abs=2e-3)


def test_in_half_precision_the_loss_is_float32() -> None:
    """Under autocast, of a bfloat16 prediction, as good as in float64."""
    torch.manual_seed(1)
    x0, noise = torch.randn(2, 64, 4, 4, 4)
    t = time_of(torch.linspace(0, 999, 64).floor())
    prediction = torch.randn(64, 8, 4, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        noised = OBJECTIVE.noised(x0, noise, t)
        losses = OBJECTIVE.losses(Captured(prediction=prediction), noised)
    exactly = OBJECTIVE.losses(
        Captured(prediction=prediction.double()),
        OBJECTIVE.noised(x0.double(), noise.double(), t.double()),
    )
    assert noised.x_t.dtype == torch.float32
    for name, values in losses.items():
        assert values.dtype == torch.float32
        assert_close(values.double(), exactly[name], rtol=1e-5, atol=1e-6)


def test_a_time_of_each_pixel() -> None:
    """Groups of tokens at times of their own: each pixel is as in an image of that time."""
    torch.manual_seed(2)
    x0, noise = torch.randn(2, 1, 4, 2, 2, dtype=torch.float64)
    prediction = torch.randn(1, 8, 2, 2, dtype=torch.float64)
    t = time_of(torch.tensor([[0.0, 300.0], [300.0, 999.0]], dtype=torch.float64))[None, None]
    mixed = OBJECTIVE.noised(x0, noise, t)
    noise_guess, variance = OBJECTIVE.split(prediction)
    bound = OBJECTIVE.bound(noise_guess, variance, mixed)
    for time in t.unique():
        alone = OBJECTIVE.noised(x0, noise, time.reshape(1))
        here = (t == time).expand_as(x0)
        assert torch.equal(mixed.x_t[here], alone.x_t[here])
        assert torch.equal(bound[here], OBJECTIVE.bound(noise_guess, variance, alone)[here])


def test_gradients_stay_finite_for_any_prediction() -> None:
    """At the noisy end and at step 0, for variances far outside their range."""
    x0, noise = 3 * torch.randn(2, 6, 4, 2, 2)
    t = time_of(torch.tensor([0.0, 1.0, 2.0, 500.0, 998.0, 999.0]))
    for scale in (1e-3, 1.0, 30.0):
        prediction = (scale * torch.randn(6, 8, 2, 2)).requires_grad_()
        losses = OBJECTIVE.losses(Captured(prediction=prediction), OBJECTIVE.noised(x0, noise, t))
        sum(value.mean() for value in losses.values()).backward()
        assert torch.isfinite(prediction.grad).all()
