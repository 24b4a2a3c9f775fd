"""Rotary positions against golden numbers, complex numbers, and what they are for."""

from __future__ import annotations

import cmath
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from repa.trainer.models.layers import Attention
from repa.trainer.models.rotary import axial_rotation, rotate

if TYPE_CHECKING:
    from pathlib import Path


def test_golden(shared: Path) -> None:
    with np.load(shared / "golden" / "urepa.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file if key.startswith("rope_")}
    for name in ("rope_q", "rope_k"):
        turned = rotate(golden[name].transpose(1, 2), axial_rotation(12, (4, 4)))
        torch.testing.assert_close(turned.transpose(1, 2), golden[f"{name}_out"], rtol=0, atol=1e-9)


def test_each_pair_is_a_complex_number_that_turns() -> None:
    heads = torch.randn(2, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(heads, axial_rotation(8, (2, 3)))
    for row in range(2):
        for column in range(3):
            for pair in range(4):
                place = row if pair % 2 else column
                angle = place * 10_000 ** (-4 * (pair // 2) / 8)
                before = heads[:, :, 3 * row + column, 2 * pair : 2 * pair + 2]
                after = torch.view_as_complex(before.contiguous()) * cmath.exp(1j * angle)
                found = turned[:, :, 3 * row + column, 2 * pair : 2 * pair + 2]
                torch.testing.assert_close(torch.view_as_complex(found.contiguous()), after)


def test_products_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = axial_rotation(8, (4, 5))
    queries, keys = (rotate(each.expand(1, 1, 20, 8), rotation)[0, 0] for each in (query, key))
    products = (queries @ keys.T).unflatten(0, (4, 5)).unflatten(2, (4, 5))
    torch.testing.assert_close(products[1, 1, 3, 2], products[0, 3, 2, 4])
    assert abs(products[1, 1, 3, 2] - products[3, 2, 1, 1]) > 1e-3


def test_attention_sees_the_places() -> None:
    """Without positions it does not matter in which order the tokens stand; with them it does."""
    torch.manual_seed(0)
    layer = Attention(16, 2, qk_norm=False).double()
    x, rotation = torch.randn(1, 6, 16, dtype=torch.float64), axial_rotation(8, (2, 3))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(layer(x[:, order])[0], layer(x)[0][:, order])
    assert (layer(x[:, order], rotation)[0] - layer(x, rotation)[0][:, order]).abs().max() > 1e-3
    _, plain_queries, plain_keys = layer(x)
    _, queries, keys = layer(x, rotation)
    assert torch.equal(queries, rotate(plain_queries, rotation))
    assert torch.equal(keys, rotate(plain_keys, rotation))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        axial_rotation(6, (2, 2))
