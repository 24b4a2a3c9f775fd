"""Gradients as one vector each: cosine and relative difference by hand."""

from __future__ import annotations

import pytest
import torch
from repa.trainer.step.gradients import cosine, relative_difference


def test_by_hand_over_tensors_of_several_shapes() -> None:
    first = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    second = [torch.tensor([3.0, 4.0]), torch.tensor([[0.0]])]
    # 9 / (5 · 5); √(16 + 16) / 5
    assert cosine(first, second).item() == pytest.approx(0.36, abs=1e-15)
    assert relative_difference(first, second).item() == pytest.approx(32**0.5 / 5, abs=1e-15)


def test_of_zeros() -> None:
    zero, one = [torch.zeros(3)], [torch.ones(3)]
    assert cosine(zero, one).item() == 0.0
    assert relative_difference(zero, zero).item() == 0.0
    assert relative_difference(zero, one).item() == 1.0
    assert relative_difference(one, zero).item() == float("inf")


def test_in_float64() -> None:
    """A difference below float32's own digits of the norm is seen."""
    exact = [torch.full((1000,), 1.0)]
    moved = [exact[0].clone()]
    moved[0][0] += 2.0**-20
    assert relative_difference(moved, exact).item() == pytest.approx(2.0**-20 / 1000**0.5, rel=1e-12)
