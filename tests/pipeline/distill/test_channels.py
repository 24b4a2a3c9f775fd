"""The choice of the channels that stay active, against least squares over all of them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repa.pipeline.distill.channels import ChannelChoice

CPU = torch.device("cpu")


def order(z: np.ndarray, a: np.ndarray, weights: np.ndarray, active: int, parts: int = 1) -> list[int]:
    choice = ChannelChoice(z.shape[1], a.shape[1], CPU)
    for some in np.array_split(np.arange(len(z)), parts):
        choice.add(torch.from_numpy(z[some]), torch.from_numpy(a[some]))
    found: list[int] = choice.order(torch.from_numpy(weights), active).tolist()
    return found


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), parts=st.integers(1, 3))
def test_the_first_is_the_best_one(seed: int, parts: int) -> None:
    drawn = np.random.default_rng(seed)
    z, weights = drawn.normal(size=(200, 2)) + 1, drawn.normal(size=(3, 5))
    a = np.maximum(z @ drawn.normal(size=(2, 5)) + drawn.normal(size=5), 0)
    wanted = a @ weights.T
    errors = []
    for channel in range(5):
        features = np.hstack([a[:, [channel]], z, np.ones((200, 1))])
        left = wanted - features @ np.linalg.lstsq(features, wanted, rcond=None)[0]
        errors.append(np.square(left).sum())
    first = order(z, a, weights, 1, parts)[0]
    # the ridge moves errors by some thousandths of what is to be explained
    assert errors[first] <= min(errors) + 0.01 * np.square(wanted - wanted.mean(0)).sum()


def test_lines_and_repetitions_stay_idle() -> None:
    drawn = np.random.default_rng(0)
    z = drawn.normal(size=(300, 2))
    curve, other = np.abs(z[:, 0]), 0.3 * np.abs(z[:, 1])
    # a line of great variance, one channel twice, a constant, and a smaller one that nothing else gives
    a = np.stack([50 * z[:, 0], curve, np.full(300, 3.0), curve, other], axis=1)
    found = order(z, a, np.ones((1, 5)), 2)
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert found[:2] in ([1, 4], [3, 4])
    assert found[2:] == sorted(found[2:])


def test_more_than_there_is_to_choose() -> None:
    z = np.random.default_rng(0).normal(size=(50, 2))
    for active in (0, 3, 4):
        assert sorted(order(z, np.zeros((50, 4)), np.ones((2, 4)), active)) == [0, 1, 2, 3]
