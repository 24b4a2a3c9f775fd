"""The terms of REPA and HASTE as functions, against their formulas and against the golden numbers."""

from __future__ import annotations

import math

import pytest
import torch
from repa import losses
from repa.attention import Attention
from repa.data.errors import RepaError


def test_repa_by_hand() -> None:
    projected = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[[4.0, 3.0], [0.0, 2.0]]], dtype=torch.float64, requires_grad=True)
    loss = losses.repa(projected, tokens)
    assert loss.item() == pytest.approx(-(24 / 25 + 0) / 2, abs=1e-15)
    loss.backward()
    assert tokens.grad is None
    # the gradient of −cos/2 in z of (1, 0) towards (0, 1) is −(0, 1)/2
    assert projected.grad is not None
    assert projected.grad[0, 1].tolist() == pytest.approx([0, -0.5])


def test_haste_is_the_cross_entropy() -> None:
    draws = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randn(2, 3, 5, 4, generator=draws, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    teacher = Attention(
        *(torch.randn(2, 2, 5, 7, generator=draws, dtype=torch.float64) for _ in range(2)), scale=0.3
    )
    loss = losses.haste(queries, keys, teacher)
    target = torch.softmax(teacher.queries @ teacher.keys.mT * 0.3, -1)
    wanted = -(target * torch.log_softmax(queries[:, :2] @ keys[:, :2].mT / math.sqrt(4), -1)).sum(-1).mean()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-12)
    found = torch.autograd.grad(loss, (queries, keys))
    for one, two in zip(found, torch.autograd.grad(wanted, (queries, keys)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


def test_what_does_not_fit() -> None:
    values = torch.zeros(1, 2, 4, 3)
    for action, field in (
        (lambda: losses.repa(torch.zeros(1, 4, 3), torch.zeros(1, 4, 5)), "projected"),
        (
            lambda: losses.haste(values, values, Attention(*[torch.zeros(1, 3, 4, 3)] * 2, scale=1.0)),
            "queries",
        ),
        (
            lambda: losses.haste(values, values, Attention(*[torch.zeros(1, 2, 5, 3)] * 2, scale=1.0)),
            "queries",
        ),
    ):
        with pytest.raises(RepaError) as caught:
            action()
        assert caught.value.field == field
