"""Attention maps formed some heads at a time while a form is fitted, measured and computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import Largest
from repa.pipeline.columns import slabs
from repa.pipeline.columns.factoring import weighted_moments
from repa.pipeline.columns.measures import GradientErrors, attention_divergence
from repa.pipeline.columns.slabs import head_slabs, images_at_once

if TYPE_CHECKING:
    from torch import Tensor

SCALE = 0.4


@given(heads=st.integers(1, 40), tokens=st.integers(1, 3000))
def test_every_head_is_in_one_slab(heads: int, tokens: int) -> None:
    parts = [list(range(heads))[some] for some in head_slabs(heads, tokens)]
    assert [head for part in parts for head in part] == list(range(heads))
    assert all(len(part) * tokens**2 <= slabs.MAP_NUMBERS or len(part) == 1 for part in parts)
    images = images_at_once(heads, tokens)
    assert images * heads * tokens**2 <= slabs.GPU_MAP_NUMBERS or images == 1
    assert (images + 1) * heads * tokens**2 > slabs.GPU_MAP_NUMBERS


def drawn(heads: int, tokens: int, width: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Queries and keys of two images and two blocks, as computed and as stored."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(2, 2, 2, heads, tokens, width, generator=generator)
    stored = exact + 0.1 * torch.randn(exact.shape, generator=generator)
    return (exact[0], exact[1]), (stored[0], stored[1])


def everything(heads: int, tokens: int, width: int) -> list[Tensor]:
    exact, stored = drawn(heads, tokens, width)
    gradients = GradientErrors(heads, tokens, width, SCALE)(exact, stored)
    moments = weighted_moments(exact[0][:, 0], exact[1][:, 0], SCALE)
    divergence = attention_divergence(exact, stored, SCALE)
    return [divergence, *moments, *(each for pair in gradients.values() for each in pair)]


@pytest.mark.parametrize("numbers", [1, 2 * 16**2, 4 * 16**2 + 3])
def test_the_size_of_a_slab_changes_no_bit(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = everything(5, 16, 8)
    monkeypatch.setattr(slabs, "MAP_NUMBERS", numbers)
    for mine, other in zip(everything(5, 16, 8), whole, strict=True):
        assert torch.equal(mine, other)


def test_at_1024_tokens_one_map_is_formed_at_a_time() -> None:
    exact, stored = ((q[:1, :1], k[:1, :1]) for q, k in drawn(2, 1024, 4))
    with Largest() as largest:
        attention_divergence(exact, stored, SCALE)
        GradientErrors(2, 1024, 4, SCALE)(exact, stored)
        weighted_moments(exact[0][:, 0], exact[1][:, 0], SCALE)
    assert largest.numbers == slabs.MAP_NUMBERS == 1024**2
