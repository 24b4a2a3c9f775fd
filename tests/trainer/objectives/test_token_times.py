"""Laws of several times an image: exact sizes, whole images, the baseline's time, shares of micro-batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from repa.trainer.models.conditioning import LabelConditioner
from repa.trainer.models.token_groups import TokenGroups
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.objectives.token_times import TokenTimes
from repa.trainer.step.draws import Draws, StepDraws
from torch._subclasses.fake_tensor import FakeTensorMode

TOKENS = 64


def draw(law: TokenTimes | None, count: int = 8, *, step: int = 0) -> Draws:
    made = StepDraws(seed=0, rank=0, device=torch.device("cpu"))
    times: Any = Flow(FlowConfig()).times
    given_law = None if law is None else (law, TOKENS)
    return made.of_step(step, count, (2, 3, 3), times, LabelConditioner(3, 4), token_times=given_law)


@given(st.integers(0, 300), st.lists(st.floats(0.01, 1), min_size=1, max_size=4))
def test_sizes_are_exact(tokens: int, parts: list[float]) -> None:
    shares = tuple(part / math.fsum(parts) for part in parts)
    sizes = TokenTimes(shares=shares).sizes(tokens)
    assert sum(sizes) == tokens
    for share, size in zip(shares, sizes, strict=True):
        assert abs(size - share * tokens) < 1 + 1e-9


def test_sizes_as_published() -> None:
    assert TokenTimes(shares=(0.25, 0.75)).sizes(64) == (16, 48)
    assert TokenTimes(shares=(0.35, 0.65)).sizes(256) == (90, 166)


def test_each_image_has_groups_of_exact_sizes_in_random_places() -> None:
    draws = draw(TokenTimes(shares=(0.25, 0.75)), 400)
    assert draws.groups is not None
    assert draws.t.shape == (400, 2)
    assert draws.groups.shape == (400, TOKENS)
    assert ((draws.groups == 0).sum(1) == 16).all()
    often = (draws.groups == 0).double().mean(0)
    assert (often - 0.25).abs().max() < 0.09
    assert not torch.equal(draws.groups[0], draws.groups[1])


def test_the_last_group_has_the_time_of_the_baseline() -> None:
    plain, dual = draw(None), draw(TokenTimes(shares=(0.25, 0.75)))
    assert plain.groups is None
    assert torch.equal(dual.t[:, 1], plain.t)
    assert not torch.equal(dual.t[:, 0], plain.t)
    for name in ("posterior", "noise", "dropped"):
        assert torch.equal(getattr(plain, name), getattr(dual, name))
    one = draw(TokenTimes(shares=(0.25, 0.75), one_time=True))
    assert torch.equal(one.t, plain.t.unsqueeze(1).expand(-1, 2))


def test_whole_images_have_one_group_and_one_time() -> None:
    draws = draw(TokenTimes(shares=(0.25, 0.75), whole=0.3), 400)
    assert draws.groups is not None
    whole = (draws.groups == 1).all(1)
    assert 0.2 < whole.double().mean() < 0.4
    assert torch.equal(draws.t[whole, 0], draws.t[whole, 1])
    assert (draws.t[~whole, 0] != draws.t[~whole, 1]).all()
    assert ((draws.groups[~whole] == 0).sum(1) == 16).all()


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values stand for a device that has not computed them yet."""
    with FakeTensorMode():
        draws = draw(TokenTimes(shares=(0.25, 0.75), whole=0.3))
        assert draws.groups is not None
        groups = TokenGroups(of_token=draws.groups, separate=True)
        assert groups.on_latent(draws.t, (8, 8), 2).shape == (8, 1, 16, 16)
        mask = groups.mask()
        assert mask is not None
        assert mask.shape == (8, 1, TOKENS, TOKENS)


def test_micro_batches_share_the_draws_of_the_step() -> None:
    whole = draw(TokenTimes(shares=(0.2, 0.3, 0.5)))
    parts = [whole.micro_batch(index, 2) for index in range(4)]
    assert whole.groups is not None
    assert torch.equal(torch.cat([part.groups for part in parts if part.groups is not None]), whole.groups)
    assert torch.equal(torch.cat([part.t for part in parts]), whole.t)
    assert whole.t.shape == (8, 3)
    other = draw(TokenTimes(shares=(0.2, 0.3, 0.5)), step=1)
    assert other.groups is not None
    assert not torch.equal(other.groups, whole.groups)
