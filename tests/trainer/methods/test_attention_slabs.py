"""HASTE's attention term at 1,024 tokens, as of 512² images: whole rows, formed slab by slab."""

from __future__ import annotations

import math

import pytest
import torch
from largest_tensor import Largest
from repa.trainer.methods import slabs
from repa.trainer.methods.attention import attention_alignment
from torch import Tensor

TOKENS = 1024


def drawn(images: int, heads: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries and keys of the student, and of the teacher."""
    generator = torch.Generator().manual_seed(0)
    widths = (8, 8, 5, 5)
    return [
        torch.randn(images, heads, tokens, width, generator=generator, dtype=torch.float64).to(dtype)
        for width in widths
    ]


def aligned(sides: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, excess, and the gradients of the student's queries and keys."""
    q, k = (each.clone().requires_grad_() for each in sides[:2])
    value, excess = attention_alignment(q, k, *sides[2:], scale=0.6, teacher_scale=0.8)
    return (value.detach(), excess, *torch.autograd.grad(value, (q, k)))


def row_by_row(sides: list[Tensor], row_length: int) -> tuple[float, Tensor, Tensor]:
    """A plain loop over images, heads and query rows; the softmax is over so many keys at a time."""
    q, k, tq, tk = sides
    for_queries, for_keys = torch.zeros_like(q), torch.zeros_like(k)
    values = []
    for image in range(len(q)):
        for head in range(q.shape[1]):
            for row in range(q.shape[2]):
                keys, theirs = k[image, head], tk[image, head]
                own = (0.6 * (keys * q[image, head, row]).sum(-1)).split(row_length)
                wanted = (0.8 * (theirs * tq[image, head, row]).sum(-1)).split(row_length)
                off = []
                for mine, other in zip(own, wanted, strict=True):
                    p = (other - other.max()).exp()
                    p = p / p.sum()
                    s = (mine - mine.max()).exp()
                    values.append(float(-(p * (mine - mine.max() - s.sum().log())).sum()))
                    off.append(s / s.sum() - p)
                change = 0.6 * torch.cat(off)
                for_queries[image, head, row] = change @ keys
                for_keys[image, head] += change[:, None] * q[image, head, row]
    count = len(values)
    return math.fsum(values) / count, for_queries / count, for_keys / count


def test_rows_are_as_long_as_there_are_tokens() -> None:
    """The released code's softmax is over rows of 256 whatever the tokens, quarters of the rows here."""
    sides = drawn(1, 2, TOKENS, torch.float64)
    value, _, *gradients = aligned(sides)
    expected, *slow = row_by_row(sides, TOKENS)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    for mine, theirs in zip(gradients, slow, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-15)
    quarters, _, _ = row_by_row(sides, 256)
    assert value.item() - quarters > 1


@pytest.mark.parametrize("tokens", [16, 60, 64])
@pytest.mark.parametrize("numbers", [1, 2 * 60**2 + 5, 7 * 64**2, 1 << 40])
def test_the_size_of_a_slab_changes_no_bit(
    tokens: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = drawn(5, 3, tokens)
    whole = aligned(sides)
    monkeypatch.setattr(slabs, "MAP_NUMBERS_ON_CPU", numbers)
    for mine, other in zip(aligned(sides), whole, strict=True):
        assert torch.equal(mine, other)


def test_no_more_maps_exist_than_a_slab_holds() -> None:
    sides = drawn(2, 6, TOKENS)
    with Largest() as largest:
        aligned(sides)
    assert largest.numbers == slabs.MAP_NUMBERS_ON_CPU == 4 * TOKENS**2
