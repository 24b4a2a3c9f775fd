from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.data.reading.order import (
    EpochOrder,
    batch_views,
    cursor_of,
    permutation,
    rank_slice,
    split_holdout,
)

SEEDS = st.integers(0, 2**64 - 1)
EPOCHS = st.integers(0, 2**40)


@settings(deadline=None)
@given(SEEDS, EPOCHS, st.integers(1, 3000))
def test_permutation_is_a_bijection(seed: int, epoch: int, count: int) -> None:
    order = permutation(seed, epoch, count)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, permutation(seed, epoch, count))


@settings(deadline=None)
@given(SEEDS, EPOCHS, st.integers(50, 500))
def test_permutation_differs_by_seed_and_by_epoch(seed: int, epoch: int, count: int) -> None:
    order = permutation(seed, epoch, count)
    assert not np.array_equal(order, permutation(seed ^ 1, epoch, count))
    assert not np.array_equal(order, permutation(seed, epoch + 1, count))
    # the two halves of the key must not be interchangeable
    assert seed == epoch or not np.array_equal(order, permutation(epoch, seed, count))


def test_permutation_has_the_values_of_philox() -> None:
    # golden: a resumed run must see the same order on every platform and with every NumPy
    assert permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(7, 3, 10).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]
    assert permutation(2**64 - 1, 0, 6).tolist() == [0, 4, 2, 3, 1, 5]


def test_permutation_is_uniform() -> None:
    # each of the 24 orders of 4 should come 1000 times; chi² with 23 degrees of freedom, p = 1e-5 at 64.6
    seen: dict[tuple[int, ...], int] = {}
    for epoch in range(24_000):
        order = tuple(permutation(5, epoch, 4).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert sum((count - 1000) ** 2 / 1000 for count in seen.values()) < 64.6


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_outside_the_key_is_refused(seed: int) -> None:
    with pytest.raises(RepaError, match=r"seed .* is not between 0 and"):
        permutation(seed, 0, 4)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 60), st.integers(0, 59), st.integers(0, 5))
def test_an_epoch_gives_no_image_twice(seed: int, batch: int, extra: int, epoch: int) -> None:
    count = batch * 3 + extra % batch
    order = EpochOrder(seed=seed, count=count)
    first = epoch * 3 * batch
    rows = np.concatenate([order.batch(first + index * batch, batch) for index in range(3)])
    assert len(set(rows.tolist())) == len(rows) == 3 * batch
    assert np.array_equal(rows, permutation(seed, epoch, count)[: 3 * batch])


def test_left_out_images_differ_from_epoch_to_epoch() -> None:
    order = EpochOrder(seed=1, count=33)
    left_out = set()
    for epoch in range(20):
        rows = np.concatenate([order.batch(30 * epoch + seen, 10) for seen in (0, 10, 20)])
        left_out.add(frozenset(range(33)) - frozenset(rows.tolist()))
    assert all(len(images) == 3 for images in left_out)
    assert len(left_out) > 15


@settings(deadline=None)
@given(SEEDS, st.integers(0, 10**7), st.integers(1, 64), st.integers(0, 200))
def test_a_batch_depends_on_nothing_asked_for_before(seed: int, seen: int, batch: int, extra: int) -> None:
    count = batch + extra
    order = EpochOrder(seed=seed, count=count)
    for images_seen in (seen, seen + batch, 0, seen + count * 3, seen):
        expected = EpochOrder(seed=seed, count=count).batch(images_seen, batch)
        assert np.array_equal(order.batch(images_seen, batch), expected)


def test_place_counts_steps_epochs_and_batches() -> None:
    assert cursor_of(0, batch_size=4, count=10) == (0, 0, 0)
    assert cursor_of(4, batch_size=4, count=10) == (1, 0, 1)
    assert cursor_of(8, batch_size=4, count=10) == (2, 1, 0)
    assert cursor_of(28, batch_size=4, count=10) == (7, 3, 1)
    assert cursor_of(10**15, batch_size=1, count=1) == (10**15, 10**15, 0)


def test_a_new_batch_size_continues_as_if_the_run_always_had_it() -> None:
    # 7 steps of 6 of 20 images, then batches of 4: 42 images are 10 steps of 4, and two images more
    assert cursor_of(42, batch_size=4, count=20) == (10, 2, 0)
    order = EpochOrder(seed=3, count=20)
    for later in range(0, 80, 4):
        assert np.array_equal(order.batch(42 + later, 4), order.batch(40 + later, 4))
        assert cursor_of(42 + later, batch_size=4, count=20).step == 10 + later // 4


def test_batch_larger_than_the_image_set_is_refused() -> None:
    with pytest.raises(RepaError, match="a batch of 9 images is larger than the 8 images"):
        EpochOrder(seed=0, count=8).batch(0, 9)
    assert sorted(EpochOrder(seed=0, count=8).batch(0, 8).tolist()) == list(range(8))


@pytest.mark.parametrize(("images_seen", "batch_size"), [(-1, 4), (0, 0), (0, -4)])
def test_numbers_out_of_range_are_refused(images_seen: int, batch_size: int) -> None:
    with pytest.raises(RepaError):
        cursor_of(images_seen, batch_size=batch_size, count=8)


@given(st.integers(1, 12), st.integers(1, 20))
def test_rank_slices_partition_the_batch(world: int, size: int) -> None:
    batch = np.random.default_rng(world * 100 + size).permutation(world * size)
    slices = [rank_slice(batch, rank, world) for rank in range(world)]
    assert all(len(part) == size for part in slices)
    assert np.array_equal(np.concatenate(slices), batch)


def test_uneven_ranks_are_refused() -> None:
    with pytest.raises(RepaError, match="multiple of 3"):
        rank_slice(np.arange(8), 0, 3)
    with pytest.raises(RepaError, match="rank 3"):
        rank_slice(np.arange(9), 3, 3)


@given(st.integers(1, 400), st.data())
def test_holdout_is_disjoint_complete_and_even(count: int, data: st.DataObject) -> None:
    rows = np.sort(np.random.default_rng(count).choice(10 * count, count, replace=False)).astype(np.int64)
    holdout = data.draw(st.integers(0, count - 1))
    train, held = split_holdout(rows, holdout)
    assert len(held) == holdout
    assert np.array_equal(np.sort(np.concatenate([train, held])), rows)
    assert np.array_equal(train, np.sort(train))
    if holdout:
        places = np.searchsorted(rows, held)
        gaps = np.diff(np.concatenate([[-1], places, [count]]))
        # inner gaps are the mean rounded down or up; the ends are half gaps
        assert all(gap in (count // holdout, -(-count // holdout)) for gap in gaps[1:-1])
        assert gaps[0] <= -(-count // holdout)
        assert gaps[-1] <= -(-count // holdout)


def test_holdout_takes_each_class_its_share() -> None:
    _, held = split_holdout(np.arange(100, dtype=np.int64), 10)
    assert held.tolist() == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]


@pytest.mark.parametrize("holdout", [-1, 5, 6])
def test_holding_out_everything_is_refused(holdout: int) -> None:
    with pytest.raises(RepaError, match="held out"):
        split_holdout(np.arange(5, dtype=np.int64), holdout)


def test_views_are_drawn_per_image_and_step() -> None:
    assert batch_views(seed=0, step=5, batch_size=6, views=1).tolist() == [0] * 6
    draws = np.stack([batch_views(seed=0, step=step, batch_size=64, views=2) for step in range(200)])
    assert draws.dtype == np.int64
    assert set(np.unique(draws).tolist()) == {0, 1}
    # 12,800 fair coins: five standard deviations are 283
    assert abs(int(draws.sum()) - 6400) < 283
    assert len({row.tobytes() for row in draws}) == 200
    assert np.array_equal(draws[7], batch_views(seed=0, step=7, batch_size=64, views=2))
    assert not np.array_equal(draws[7], batch_views(seed=1, step=7, batch_size=64, views=2))
