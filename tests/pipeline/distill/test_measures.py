"""What is measured of a copy, and the regression it starts from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repa.pipeline.distill.fidelity import fidelity, neighbour_agreement
from repa.pipeline.distill.least_squares import LeastSquares
from repa.pipeline.distill.pairs import Pairs


class Encoder:
    """Gives what it was made with, image by image; an image is its number."""

    def __init__(self, patch: torch.Tensor, cls: torch.Tensor) -> None:
        self.patch, self.cls = patch, cls

    def encode(self, images: torch.Tensor, attention: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
        numbers = images[:, 0, 0, 0].long()
        return {"patch": self.patch[numbers], "cls": self.cls[numbers]}


def measured(
    patch: torch.Tensor, cls: torch.Tensor, own: torch.Tensor, own_cls: torch.Tensor, size: int
) -> dict:
    images = torch.arange(len(patch), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    parts = [slice(start, start + size) for start in range(0, len(patch), size)]
    return fidelity(Encoder(own, own_cls), [Pairs(images[each], patch[each], cls[each]) for each in parts])


@pytest.mark.parametrize("size", [1, 3, 7])
def test_fidelity_by_its_definition(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    patch, noise = torch.randn(2, 7, 5, 6, generator=generator)
    cls, other = torch.randn(2, 7, 6, generator=generator)
    own = patch + 0.5 * noise
    found = measured(patch, cls, own, cls + other, size)
    a, b = (each.double().numpy() for each in (own, patch))
    unit_a, unit_b = (each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (a, b))
    cosine = (unit_a * unit_b).sum(-1)
    assert found["images"] == 7
    assert found["patch_cosine_mean"] == pytest.approx(cosine.mean(), abs=1e-6)
    assert found["patch_cosine_p01"] == pytest.approx(cosine.min(), abs=1e-6)
    assert found["patch_cosine_worst_image"] == pytest.approx(cosine.mean(1).min(), abs=1e-6)
    assert found["shuffled_cosine"] == pytest.approx((unit_a[1:] * unit_b[:-1]).sum(-1).mean(), abs=1e-6)
    l2 = np.linalg.norm((a - b).reshape(7, -1), axis=1) / np.linalg.norm(b.reshape(7, -1), axis=1)
    assert found["relative_l2"] == pytest.approx(l2.mean(), abs=1e-6)
    gram = np.abs(unit_a @ unit_a.transpose(0, 2, 1) - unit_b @ unit_b.transpose(0, 2, 1))
    assert found["gram_error"] == pytest.approx(gram.mean(), abs=1e-6)
    assert 0 < found["repa_loss_change"] < np.sqrt(2 - 2 * cosine).mean()
    assert found["neighbours"] == 6
    assert found["neighbour_agreement"] == 1.0, "all others are among the nearest six of seven"


def test_a_teacher_is_its_own_copy() -> None:
    patch, cls = torch.randn(5, 4, 6), torch.randn(5, 6)
    found = measured(patch, cls, patch, cls, 2)
    assert found["patch_cosine_p01"] == pytest.approx(1, abs=1e-6)
    assert found["class_cosine_mean"] == pytest.approx(1, abs=1e-6)
    assert found["relative_l2"] == found["gram_error"] == found["repa_loss_change"] == 0


def test_change_of_the_loss_in_closed_form() -> None:
    # a prediction at cosine 0.5 to the token is at −0.5 to its opposite
    patch, cls = torch.randn(3, 4, 6), torch.randn(3, 6)
    assert measured(patch, cls, -patch, cls, 2)["repa_loss_change"] == pytest.approx(1, abs=1e-6)
    assert measured(patch, cls, 3 * patch, cls, 2)["repa_loss_change"] == pytest.approx(0, abs=1e-6)
    # in the plane it is 60° on one side of the token or the other
    angle = torch.tensor(0.3, dtype=torch.float64)
    token = torch.tensor([[[1.0, 0.0]]]).expand(2, 1, 2)
    turned = torch.stack([angle.cos(), angle.sin()]).float().expand(2, 1, 2)
    found = measured(token, token[:, 0], turned, turned[:, 0], 1)["repa_loss_change"]
    sides = [abs(0.5 - np.cos(np.pi / 3 + side * 0.3)) for side in (-1, 1)]
    assert min(abs(found - each) for each in sides) < 1e-6


def test_neighbours_in_common() -> None:
    angles = torch.tensor([0.0, 0.1, 1.0, 1.1])
    moved = torch.tensor([0.0, 0.9, 0.1, 1.0])
    first, second = (torch.stack([each.cos(), each.sin()], dim=1) for each in (angles, moved))
    assert neighbour_agreement(first, first, 1) == 1.0
    # nearest: 1 0 3 2 and 2 3 0 1
    assert neighbour_agreement(first, second, 1) == 0.0


@settings(max_examples=15)
@given(features=st.integers(1, 5), outputs=st.integers(1, 3), parts=st.integers(1, 4))
def test_regression_is_the_exact_one(features: int, outputs: int, parts: int) -> None:
    generator = np.random.default_rng(features + 10 * outputs)
    x, y = generator.normal(size=(40, features)) + 3, generator.normal(size=(40, outputs))
    fit = LeastSquares(features, outputs, torch.device("cpu"))
    for some in np.array_split(np.arange(40), parts):
        fit.add(torch.from_numpy(x[some]), torch.from_numpy(y[some]))
    weights, bias = (each.numpy() for each in fit.solve(0.0))
    exact = np.linalg.lstsq(np.hstack([x, np.ones((40, 1))]), y, rcond=None)[0]
    np.testing.assert_allclose(np.vstack([weights.T, bias]), exact, rtol=1e-6, atol=1e-8)


def test_ridge_shrinks_and_constants_have_no_weight() -> None:
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, torch.full((30, 1), 2.0, dtype=torch.float64)], dim=1)
    fit = LeastSquares(3, 1, torch.device("cpu"))
    fit.add(x, x[:, :1] * 3 + 5)
    exact, _ = fit.solve(1e-12)
    shrunk, bias = fit.solve(1.0)
    torch.testing.assert_close(exact, torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64), atol=1e-6, rtol=0)
    assert 0 < shrunk[0, 0] < 2.0
    assert float(shrunk[0, 2]) == pytest.approx(0, abs=1e-9)
    assert float(bias[0]) == pytest.approx(float(5 + (3 * x[:, 0] - x @ shrunk[0]).mean()), abs=1e-9)
