"""Fréchet distance against closed forms, and its moments against one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.trainer.evaluation.frechet import frechet_distance, frechet_distance_at_infinity
from repa.trainer.evaluation.moments import Moments, MomentSums, moments_of

RANDOM = np.random.default_rng(0)


def test_equal_sets_have_no_distance() -> None:
    features = RANDOM.normal(size=(50, 7))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features[RANDOM.permutation(50)]) == pytest.approx(0, abs=1e-9)


def test_a_shift_costs_its_square() -> None:
    features = RANDOM.normal(size=(40, 5))
    shift = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    assert frechet_distance(features, features + shift) == pytest.approx(shift @ shift, rel=1e-9)


def test_a_scale_costs_the_difference_of_the_deviations() -> None:
    features = RANDOM.normal(size=(60, 6))
    features -= features.mean(axis=0)
    scales = np.array([1.0, 2.0, 0.5, 3.0, 1.5, 0.1])
    # decorrelated, so that the covariances commute: Σ (σ₁ − σ₂)²
    features = features @ np.linalg.inv(np.linalg.cholesky(np.cov(features.T)).T)
    expected = ((scales - 1) ** 2).sum()
    assert frechet_distance(features, features * scales) == pytest.approx(expected, rel=1e-9)


def test_one_channel() -> None:
    first, second = RANDOM.normal(1, 2, size=(30, 1)), RANDOM.normal(-1, 0.5, size=(20, 1))
    expected = (first.mean() - second.mean()) ** 2 + (first.std(ddof=1) - second.std(ddof=1)) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_against_the_eigenvalues_of_the_product() -> None:
    """tr (Σ₁Σ₂)^½ is also the sum of the roots of the eigenvalues of the unsymmetric product."""
    first, second = RANDOM.normal(size=(80, 6)), RANDOM.normal(size=(70, 6)) @ RANDOM.normal(size=(6, 6))
    covariances = np.cov(first.T), np.cov(second.T)
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real).sum()
    shift = first.mean(axis=0) - second.mean(axis=0)
    expected = shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_channels() -> None:
    first, second = RANDOM.normal(size=(5, 40)), RANDOM.normal(size=(6, 40)).astype(np.float32)
    distance = frechet_distance(first, second)
    assert np.isfinite(distance)
    assert distance > 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.zeros((1, 3)), np.zeros((4, 3))),
        (np.zeros((4, 3)), np.zeros((4, 2))),
        (np.zeros(4), np.zeros((4, 2))),
        (np.full((4, 2), np.nan), np.zeros((4, 2))),
    ],
)
def test_features_that_have_no_distance(first: np.ndarray, second: np.ndarray) -> None:
    with pytest.raises(RepaError) as caught:
        frechet_distance(first, second)
    assert caught.value.field in {"features", "reference"}
    assert caught.value.remedy


def test_moments_do_not_care_about_batches_or_the_kind_of_array() -> None:
    features = (RANDOM.normal(size=(700, 5)) + 1000).astype(np.float32)
    whole = moments_of(features)
    assert whole.count == 700
    np.testing.assert_allclose(whole.mean, features.astype(np.float64).mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(whole.covariance, np.cov(features.astype(np.float64).T), rtol=1e-9)
    for size in (1, 7, 256, 300, 699):
        sums = MomentSums()
        for start in range(0, 700, size):
            sums.add(torch.from_numpy(features[start : start + size]))
            if start > 2:
                sums.moments()  # a look in between changes nothing
        again = sums.moments()
        np.testing.assert_array_equal(again.mean, whole.mean)
        np.testing.assert_array_equal(again.covariance, whole.covariance)
    assert frechet_distance(whole, features) == pytest.approx(0, abs=1e-9)


@given(st.integers(1, 4), st.integers(2, 600), st.floats(-1e6, 1e6))
def test_moments_of_any_offset(width: int, rows: int, offset: float) -> None:
    values = np.random.default_rng(rows).normal(size=(rows, width))
    found, expected = moments_of(values + offset), np.cov(values.T).reshape(width, width)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.mean - offset, values.mean(axis=0), atol=1e-8)


def test_moments_that_do_not_fit() -> None:
    with pytest.raises(RepaError) as caught:
        Moments(np.zeros(3), np.zeros((2, 2)))
    assert caught.value.field == "reference"
    with pytest.raises(RepaError):
        Moments(np.zeros(2), np.full((2, 2), np.inf))
    sums = MomentSums()
    sums.add(np.zeros((3, 2)))
    with pytest.raises(RepaError) as caught:
        sums.add(np.zeros((3, 4)))
    assert caught.value.field == "features"
    with pytest.raises(RepaError):
        MomentSums().moments()


def test_the_limit_of_many_samples() -> None:
    """Two halves of one distribution are nearer to 0 than any finite number of samples says."""
    features, reference = RANDOM.normal(size=(1200, 8)), RANDOM.normal(size=(4000, 8))
    limit = frechet_distance_at_infinity(features, reference, smallest=100)
    assert abs(limit) < frechet_distance(features, reference) < frechet_distance(features[:100], reference)
    assert limit == frechet_distance_at_infinity(features, moments_of(reference), smallest=100)
    assert limit != frechet_distance_at_infinity(features, reference, smallest=100, seed=1)
    with pytest.raises(RepaError) as caught:
        frechet_distance_at_infinity(features, reference)
    assert caught.value.field == "smallest"
