"""The order of images from tars: permutations, and the same for the same seed, epoch and rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.data.tars.order import buffered_order, steps_of_epoch, tar_permutation


def slow_buffer(seed: int, epoch: int, rank: int, count: int, buffer: int) -> list[int]:
    """A shuffle buffer as one would write it, with the same draws."""
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, rank, 0x627566], dtype=np.uint64)
    draws = [int(word) for word in np.random.Philox(key=key, counter=counter).random_raw(count)]
    held: list[int] = []
    left = []
    used = 0
    for row in range(count):
        if len(held) < buffer:
            held.append(row)
            continue
        slot = draws[used] % buffer
        used += 1
        left.append(held[slot])
        held[slot] = row
    return left + [row for _, row in sorted(zip(draws[used:], held, strict=True))]


@given(
    st.integers(0, 2**64 - 1), st.integers(0, 9), st.integers(0, 9), st.integers(1, 200), st.integers(1, 64)
)
def test_every_row_leaves_the_buffer_once_and_not_too_early(
    seed: int, epoch: int, rank: int, count: int, buffer: int
) -> None:
    order = buffered_order(seed, epoch, rank, count, buffer)
    assert sorted(order.tolist()) == list(range(count))
    assert order.dtype == np.int64
    assert all(row < position + buffer for position, row in enumerate(order.tolist()))
    assert order.tolist() == slow_buffer(seed, epoch, rank, count, min(buffer, count))


def test_it_depends_on_seed_epoch_and_rank_and_on_nothing_else() -> None:
    found = {
        tuple(buffered_order(seed, epoch, rank, 50, 20).tolist())
        for seed in range(3)
        for epoch in range(3)
        for rank in range(3)
    }
    assert len(found) == 27
    assert np.array_equal(buffered_order(1, 2, 3, 50, 20), buffered_order(1, 2, 3, 50, 20))
    assert buffered_order(1, 2, 3, 50, 1).tolist() == list(range(50))
    tars = {tuple(tar_permutation(seed, epoch, 9).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(tars) == 16
    assert all(sorted(each) == list(range(9)) for each in tars)
    with pytest.raises(RepaError, match="seed"):
        tar_permutation(-1, 0, 3)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 5))
def test_every_rank_can_fill_the_batches_of_an_epoch(counts: list[int], world: int, size: int) -> None:
    least = sum(sorted(counts)[: len(counts) // world])
    if len(counts) < world or least < size:
        with pytest.raises(RepaError, match=r"cannot be shared|larger than what"):
            steps_of_epoch(np.array(counts), world * size, world)
        return
    steps = steps_of_epoch(np.array(counts), world * size, world)
    assert steps == least // size
    for epoch in range(3):
        tars = tar_permutation(7, epoch, len(counts))
        assert all(sum(counts[tar] for tar in tars[rank::world]) >= steps * size for rank in range(world))
    assert steps_of_epoch(np.array([8] * 12), 16, 1) == 6


def test_orders_have_the_values_they_had() -> None:
    # golden: a resumed run must see the same order on every platform and with every NumPy
    assert tar_permutation(0, 0, 10).tolist() == [2, 5, 1, 7, 6, 4, 8, 0, 9, 3]
    assert tar_permutation(2**64 - 1, 3, 6).tolist() == [0, 4, 1, 3, 2, 5]
    assert buffered_order(7, 3, 2, 12, 5).tolist() == [3, 1, 0, 2, 5, 8, 9, 4, 6, 11, 7, 10]
