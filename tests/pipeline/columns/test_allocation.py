"""The components of heads: curves that fall, sizes that are kept, and the best of all choices in small."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from repa.pipeline.columns.allocation import Allocation, head_curve
from repa.pipeline.columns.specs import bytes_per_image, factored_columns

TOKENS, SCALE = 16, 0.25


def spectra(heads: int, width: int = 6, seed: int = 0) -> np.ndarray:
    """Falling spectra ``[1, H, Dh]``, each some tenfold stronger than that of the head before."""
    generator = np.random.default_rng(seed)
    falling = 10.0 ** -np.sort(generator.uniform(0, 3, (1, heads, width)), axis=-1)
    return np.asarray(falling * 10.0 ** np.arange(heads)[:, None])


def size_of(allocation: Allocation) -> int:
    return bytes_per_image(factored_columns("demo", allocation.layout))


def expected(spectrum: np.ndarray, whole: int, half: int) -> float:
    """What components cost, written out: what is left out, and the rounding of both groups."""
    strength, kept = np.sqrt(spectrum), whole + half
    lost = spectrum[kept:].sum()
    for group, most in ((strength[:whole], 127), (strength[whole:kept], 7)):
        if len(group):
            lost += group.sum() ** 2 / len(group) * 2 * 3.0**2 / 12 / most**2
    return float(lost * SCALE**2 / 2 / TOKENS)


@given(st.integers(1, 8), st.integers(0, 100))
def test_a_curve_falls_with_every_byte(width: int, seed: int) -> None:
    spectrum = spectra(1, width, seed)[0, 0]
    curve = head_curve(spectrum, TOKENS, SCALE)
    assert (np.diff(curve.bytes) > 0).all()
    assert (np.diff(curve.loss) < 0).all()
    assert curve.components.sum(axis=1).max() <= width
    for (whole, half), size, loss in zip(curve.components, curve.bytes, curve.loss, strict=True):
        assert size == 2 * (whole * TOKENS + half * TOKENS // 2) + 4 * (whole + half)
        assert loss == pytest.approx(expected(spectrum, whole, half))
    # no choice of as many bytes loses less
    for whole, half in itertools.product(range(width + 1), repeat=2):
        if 1 <= whole + half <= width:
            size = 2 * (whole * TOKENS + half * TOKENS // 2) + 4 * (whole + half)
            best = curve.loss[curve.bytes <= size][-1]
            assert best <= expected(spectrum, whole, half) * (1 + 1e-12)


@given(st.integers(1, 4), st.floats(0, 1), st.integers(0, 100))
def test_bytes_are_kept_and_used(heads: int, share: float, seed: int) -> None:
    allocation = Allocation(spectra(heads, seed=seed), TOKENS, SCALE)
    least, most = allocation.least_bytes, heads * 6 * (2 * TOKENS + 4)
    asked = int(least + share * (most - least))
    size = allocation.for_bytes(asked)
    assert size == size_of(allocation) <= asked
    assert least == heads * (TOKENS + 4)
    # what is left is less than a component more of each head
    assert asked - size <= heads * (2 * TOKENS + 4)


@given(st.integers(1, 4), st.floats(-12, 1), st.integers(0, 100))
def test_a_loss_is_met_by_every_head_that_can(heads: int, exponent: float, seed: int) -> None:
    values = spectra(heads, seed=seed)
    allocation = Allocation(values, TOKENS, SCALE)
    loss = 10.0**exponent
    assert allocation.for_loss(loss) == size_of(allocation)
    for spectrum, (whole, half) in zip(values[0], allocation.layout.components[0], strict=True):
        curve = head_curve(spectrum, TOKENS, SCALE)
        if expected(spectrum, whole, half) > loss * (1 + 1e-9):
            assert [whole, half] == curve.components[-1].tolist()
            continue
        # a byte less would not do
        chosen = curve.components.tolist().index([whole, half])
        assert chosen == 0 or curve.loss[chosen - 1] > loss * (1 - 1e-9)


@pytest.mark.parametrize("most", [150, 200, 280])
def test_the_worst_head_is_the_best_of_all_choices(most: int) -> None:
    """Two heads of three components, every choice tried."""
    values = spectra(2, 3)
    allocation = Allocation(values, TOKENS, SCALE)
    allocation.for_bytes(most)
    chosen = allocation.layout.components[0]
    worst = max(expected(values[0, head], *chosen[head]) for head in range(2))
    pairs = [(a, b) for a, b in itertools.product(range(4), repeat=2) if 1 <= a + b <= 3]
    tried = [
        max(expected(values[0, head], *choice[head]) for head in range(2))
        for choice in itertools.product(pairs, repeat=2)
        if sum(2 * (a * TOKENS + b * TOKENS // 2) + 4 * (a + b) for a, b in choice) <= most
    ]
    assert worst == pytest.approx(min(tried))


def test_bytes_move_to_the_head_that_lost_more() -> None:
    values = np.repeat(spectra(1, 8, seed=3), 3, axis=1)
    allocation = Allocation(values, TOKENS, SCALE)
    size = allocation.for_bytes(400)
    before = [sum(head) for head in allocation.layout.components[0]]
    assert before[0] == before[1] == before[2]
    loss = expected(values[0, 0], *allocation.layout.components[0][0])
    allocation.learn(np.array([[loss, 30 * loss, loss / 30]]))
    assert allocation.for_bytes(size) <= size
    after = [2 * head[0] + head[1] for head in allocation.layout.components[0]]
    assert after[1] > after[0] > after[2]


def test_measured_twice_it_holds_in_both_places() -> None:
    """What is off at many bytes and not at few is corrected in between by a part of it."""
    spectrum = spectra(1, 8, seed=3)[0, 0]
    curve = head_curve(spectrum, TOKENS, SCALE)
    last = len(curve.loss) - 1
    measured = {1: float(curve.loss[1]), last - 1: float(4 * curve.loss[last - 1])}
    corrected = curve.corrected(measured)
    for index, nats in measured.items():
        assert corrected.loss[index] == pytest.approx(nats)
    off = corrected.loss / curve.loss
    assert off[0] == pytest.approx(1)
    assert (np.diff(corrected.loss) <= 0).all()
    assert 1 < off[last // 2] < 4
    assert curve.corrected({}) is curve
