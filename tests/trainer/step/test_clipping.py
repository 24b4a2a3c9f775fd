"""Clipping in AdamW's step against PyTorch's clipping before it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from repa.trainer.step.clipping import clip, forget
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

SHAPES = ((33, 7), (5,), ())


def made(gradient: float | None = None, *, fused: bool = True) -> tuple[Optimizer, list[nn.Parameter]]:
    """AdamW over parameters with normal gradients, the first number of which can be another."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for each in parameters:
        each.grad = torch.randn(each.shape, generator=generator)
    if gradient is not None:
        assert parameters[0].grad is not None
        parameters[0].grad[0, 0] = gradient
    # without a gradient, as what no loss reaches
    parameters.append(nn.Parameter(torch.ones(3)))
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=fused), parameters


def everything(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Weights, gradients and moments."""
    moments = [optimizer.state[each][name] for each in parameters[:-1] for name in ("exp_avg", "exp_avg_sq")]
    gradients = [each.grad for each in parameters if each.grad is not None]
    assert len(gradients) == len(SHAPES)
    return [*(each.detach().clone() for each in parameters), *gradients, *moments]


def stepped(
    by: Callable[[Optimizer, list[nn.Parameter]], object], gradient: float | None = None
) -> list[Tensor]:
    optimizer, parameters = made(gradient)
    by(optimizer, parameters)
    optimizer.step()
    return everything(optimizer, parameters)


@pytest.mark.parametrize("gradient", [None, 1e20, math.inf, math.nan])
def test_it_is_pytorchs_clipping_up_to_rounding(gradient: float | None) -> None:
    """Also where the norm overflows or there is none: the same numbers are none."""
    expected = stepped(lambda _, each: nn.utils.clip_grad_norm_(each, 0.5), gradient)
    found = stepped(lambda optimizer, _: clip(optimizer, 0.5, cut_up=False), gradient)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("largest", [None, 1e3])
def test_what_is_not_too_large_stays_to_the_bit(largest: float | None) -> None:
    found = stepped(lambda optimizer, _: clip(optimizer, largest, cut_up=False))
    assert all(map(torch.equal, found, stepped(lambda *_: None)))


def test_the_norm_is_that_before() -> None:
    optimizer, parameters = made()
    expected = nn.utils.clip_grad_norm_(made()[1], 0.5)
    assert torch.equal(clip(optimizer, 0.5, cut_up=False), expected)
    # the kernel clips: nothing has passed over the gradients yet
    assert all(
        each.grad is None or torch.equal(each.grad, other.grad)
        for each, other in zip(parameters, made()[1], strict=True)
    )


@pytest.mark.parametrize(("fused", "cut_up"), [(False, False), (True, True)])
def test_what_cannot_clip_in_its_step_is_clipped_before(fused: bool, cut_up: bool) -> None:
    optimizer, parameters = made(fused=fused)
    clip(optimizer, 0.5, cut_up=cut_up)
    gradients = [each.grad for each in parameters if each.grad is not None]
    assert nn.utils.get_total_norm(gradients).item() == pytest.approx(0.5, rel=1e-5)
    optimizer.step()
    assert nn.utils.get_total_norm(gradients).item() == pytest.approx(0.5, rel=1e-5)


def test_another_step_takes_what_it_gets() -> None:
    optimizer, parameters = made()
    clip(optimizer, 0.5, cut_up=False)
    optimizer.step()
    forget(optimizer)
    for each, other in zip(parameters, made()[1], strict=True):
        each.grad = other.grad
    optimizer.step()
    gradients = [each.grad for each in parameters if each.grad is not None]
    assert nn.utils.get_total_norm(gradients).item() > 5
