"""The manifold term against loops, published equations and golden numbers."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import Largest
from repa.trainer.methods import slabs
from repa.trainer.methods.relations import directions, gram, manifold_distance, mean_pair_cosine

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "urepa.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(first @ second / (first.norm() * second.norm()))


def by_loops(tokens: torch.Tensor, targets: torch.Tensor, pairs: str) -> float:
    """The mean over pairs, one pair at a time."""
    B, T, _ = tokens.shape
    places = list(itertools.product(range(B), range(T)))
    squares = [
        (cosine(tokens[i], tokens[j]) - cosine(targets[i], targets[j])) ** 2
        for i, j in itertools.product(places, places)
        if pairs == "batch" or i[0] == j[0]
    ]
    return sum(squares) / len(squares)


@pytest.mark.parametrize("pairs", ["image", "batch"])
def test_it_is_the_mean_over_the_pairs(pairs: str) -> None:
    tokens, targets = drawn(3, 5, 4), drawn(3, 5, 7, seed=1)
    value = manifold_distance(tokens, targets, pairs=pairs)
    assert value.item() == pytest.approx(by_loops(tokens, targets, pairs), abs=1e-14)


def test_golden(golden: dict[str, torch.Tensor]) -> None:
    student, teacher = golden["upsampled"], golden["z"]
    torch.testing.assert_close(gram(student)[0], golden["gram_student_0"], rtol=0, atol=1e-9)
    torch.testing.assert_close(gram(teacher)[0], golden["gram_teacher_0"], rtol=0, atol=1e-9)
    for name, given_tokens, pairs in (
        ("loss_manifold", student, "image"),
        ("loss_manifold_nearest", golden["upsampled_nearest"], "image"),
        ("loss_manifold_batch_pairs", student, "batch"),
    ):
        value = manifold_distance(given_tokens, teacher, pairs=pairs)
        torch.testing.assert_close(value, golden[name], rtol=0, atol=1e-9)
    each = torch.stack(
        [manifold_distance(*pair) for pair in zip(student[:, None], teacher[:, None], strict=True)]
    )
    torch.testing.assert_close(each, golden["loss_manifold_per_image"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("pairs", ["image", "batch"])
def test_it_is_zero_for_the_teacher_itself_however_turned_and_scaled(pairs: str) -> None:
    targets = drawn(2, 6, 5)
    rotation = torch.linalg.qr(drawn(5, 5, seed=1))[0]
    lengths = 0.5 + drawn(2, 6, 1, seed=2).abs()
    assert manifold_distance(targets, targets, pairs=pairs).item() == 0
    assert abs(manifold_distance(lengths * targets @ rotation, targets, pairs=pairs).item()) < 1e-15
    assert manifold_distance(targets.roll(1, dims=1), targets, pairs=pairs).item() > 1e-3


@pytest.mark.parametrize("pairs", ["image", "batch"])
def test_gradients(pairs: str) -> None:
    targets = drawn(2, 3, 4, seed=1)
    tokens = drawn(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: manifold_distance(each, targets, pairs=pairs), (tokens,))
    gradient = torch.autograd.grad(manifold_distance(tokens, targets, pairs=pairs), tokens)[0]
    assert gradient.abs().amax(-1).min() > 0


def test_slabs_give_the_value_and_gradients_of_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, targets = drawn(5, 12, 4).requires_grad_(), drawn(5, 12, 7, seed=1).requires_grad_()
    whole = (gram(tokens) - gram(targets)).square().mean()
    expected = (whole, *torch.autograd.grad(whole, (tokens, targets)))
    for numbers in (1, 2 * 12**2 + 5, 1 << 40):
        monkeypatch.setattr(slabs, "MAP_NUMBERS_ON_CPU", numbers)
        value = manifold_distance(tokens, targets)
        found = (value, *torch.autograd.grad(value, (tokens, targets)))
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-15)


def test_no_more_maps_exist_than_a_slab_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "MAP_NUMBERS_ON_CPU", 2 * 64**2)
    tokens, targets = drawn(6, 64, 4).requires_grad_(), drawn(6, 64, 4, seed=1)
    with Largest() as largest:
        manifold_distance(tokens, targets).backward()
    assert largest.numbers == 2 * 64**2


def test_both_factors_of_the_gram_get_a_gradient() -> None:
    """With one factor held still the gradient would be half of it, as the matrix is symmetric."""
    tokens, targets = drawn(1, 4, 3).requires_grad_(), drawn(1, 4, 3, seed=1)
    whole = torch.autograd.grad(manifold_distance(tokens, targets), tokens)[0]
    unit = F.normalize(tokens, dim=-1)
    half_loss = (unit @ unit.detach().mT - gram(targets)).square().mean()
    half = torch.autograd.grad(half_loss, tokens)[0]
    torch.testing.assert_close(whole, 2 * half)


def test_mean_pair_cosine() -> None:
    tokens = drawn(3, 5, 4)
    pairs = [cosine(image[i], image[j]) for image in tokens for i, j in itertools.permutations(range(5), 2)]
    assert mean_pair_cosine(tokens).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-14)
    collapsed = drawn(2, 1, 4).expand(2, 6, 4)
    assert mean_pair_cosine(collapsed).item() == pytest.approx(1, abs=1e-14)
    assert mean_pair_cosine(torch.eye(6)[None]).item() == pytest.approx(0, abs=1e-7)
    assert mean_pair_cosine(drawn(2, 1, 4)).item() == 0


@pytest.mark.parametrize("pairs", ["image", "batch"])
def test_zero_tokens_have_no_direction(pairs: str) -> None:
    tokens, targets = drawn(1, 3, 4), drawn(1, 3, 4, seed=1)
    tokens[0, 1] = 0
    targets[0, 2] = 0
    tokens.requires_grad_()
    value = manifold_distance(tokens, targets, pairs=pairs)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(tokens.grad).all()
    assert not tokens.grad[0, 1].any()
    assert not directions(tokens)[0, 1].any()


@pytest.mark.parametrize("pairs", ["image", "batch"])
def test_half_precision_and_autocast_do_not_reach_it(pairs: str) -> None:
    tokens, targets = drawn(2, 8, 16).bfloat16(), drawn(2, 8, 16, seed=1).half()
    expected = manifold_distance(tokens.double(), targets.double(), pairs=pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = manifold_distance(tokens, targets, pairs=pairs)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gram(tokens).dtype == torch.float32
    assert manifold_distance(targets, targets, pairs=pairs).item() == 0


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_bounds(images: int, count: int, width: int, seed: int) -> None:
    tokens, targets = drawn(images, count, width, seed=seed), drawn(images, count, width, seed=seed + 100)
    for pairs in ("image", "batch"):
        assert -1e-12 <= manifold_distance(tokens, targets, pairs=pairs).item() <= 4
    if images == 1:
        both = [manifold_distance(tokens, targets, pairs=pairs) for pairs in ("image", "batch")]
        torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-12)


def test_an_unknown_reading_is_refused() -> None:
    with pytest.raises(ValueError, match="pairs"):
        manifold_distance(drawn(1, 2, 3), drawn(1, 2, 3), pairs="column")
