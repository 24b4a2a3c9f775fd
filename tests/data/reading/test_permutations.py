from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.data.reading import order as ordering
from repa.data.reading.order import EpochOrder, block_starts, cursor_of, permutation, rank_slice
from repa.data.reading.permutations import WINDOW_BLOCKS, BlockPermutation, FeistelPermutation

SEEDS = st.integers(0, 2**64 - 1)
EPOCHS = st.integers(0, 2**40)
POWERS = [2**k + d for k in range(2, 14) for d in (-1, 0, 1)]


@settings(deadline=None, max_examples=200)
@given(SEEDS, EPOCHS, st.integers(1, 5000) | st.sampled_from(POWERS))
@example(0, 0, 1)
@example(0, 0, 2)
@example(0, 0, 3)
def test_feistel_network_is_a_permutation(seed: int, epoch: int, count: int) -> None:
    order = FeistelPermutation(seed, epoch, count).slice(0, count)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(count))


@pytest.mark.parametrize("count", POWERS)
def test_feistel_network_is_a_permutation_around_every_power_of_two(count: int) -> None:
    order = FeistelPermutation(1, 2, count).slice(0, count)
    assert np.array_equal(np.sort(order), np.arange(count))


@settings(deadline=None)
@given(SEEDS, EPOCHS, st.integers(1, 400), st.data())
def test_slices_of_a_feistel_network_are_those_of_the_whole(
    seed: int, epoch: int, count: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    order = FeistelPermutation(seed, epoch, count)
    assert np.array_equal(order.slice(start, stop), order.slice(0, count)[start:stop])


def test_feistel_network_has_the_values_it_had() -> None:
    # golden: a resumed run must see the same order on every platform and with every NumPy
    assert FeistelPermutation(0, 0, 10).slice(0, 10).tolist() == [8, 0, 6, 3, 5, 9, 7, 2, 1, 4]
    assert FeistelPermutation(2**64 - 1, 3, 10**12).slice(10**11, 10**11 + 3).tolist() == [
        775710598118,
        730838916976,
        383734882906,
    ]


def test_feistel_network_looks_random() -> None:
    """Fixed points, neighbours that stay neighbours, ascents and correlation, as of a random permutation."""
    count, epochs = 20_011, 60
    order = np.stack([FeistelPermutation(7, epoch, count).slice(0, count) for epoch in range(epochs)])
    steps = np.diff(order, axis=1)
    # means of Poisson variables of mean 1 and 2 over 60 epochs: five standard deviations
    assert abs((order == np.arange(count)).sum(axis=1).mean() - 1) < 5 / epochs**0.5
    assert abs((np.abs(steps) == 1).sum(axis=1).mean() - 2) < 5 * (2 / epochs) ** 0.5
    # ascents of a permutation of n: mean (n−1)/2, variance (n+1)/12
    ascents = (steps > 0).sum(axis=1)
    assert abs(ascents.mean() - (count - 1) / 2) < 5 * ((count + 1) / 12 / epochs) ** 0.5
    for lag in (1, 2, 141, 142):  # 142 is the base of the lower digit
        values = [np.corrcoef(each[:-lag], each[lag:])[0, 1] for each in order]
        assert abs(np.mean(values)) * (count * epochs) ** 0.5 < 5
    # an epoch and the next have nothing to do with one another
    between = [np.corrcoef(a, b)[0, 1] for a, b in pairwise(order)]
    assert abs(np.mean(between)) * (count * epochs) ** 0.5 < 5


@pytest.mark.parametrize("count", [31, 64])
def test_every_place_of_a_feistel_network_goes_anywhere(count: int) -> None:
    epochs = range(100 * count)
    draws = np.stack([FeistelPermutation(5, epoch, count).slice(0, count) for epoch in epochs])
    for place in (0, 1, count // 2, count - 1):
        found = np.bincount(draws[:, place], minlength=count)
        chi2 = float(((found - 100) ** 2 / 100).sum())
        assert abs(chi2 - (count - 1)) < 6 * (2 * (count - 1)) ** 0.5
    # of two places, too: their difference is uniform over 1 … count−1
    apart = np.bincount((draws[:, 1] - draws[:, 0]) % count, minlength=count)[1:]
    mean = 100 * count / (count - 1)
    chi2 = float(((apart - mean) ** 2 / mean).sum())
    assert abs(chi2 - (count - 2)) < 6 * (2 * (count - 2)) ** 0.5


def test_feistel_network_differs_by_seed_and_by_epoch() -> None:
    first = FeistelPermutation(3, 4, 1000).slice(0, 1000)
    for seed, epoch in ((2, 4), (3, 5), (4, 3)):
        assert (FeistelPermutation(seed, epoch, 1000).slice(0, 1000) == first).sum() < 12


def test_large_counts_are_computed_and_small_ones_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    before = permutation(1, 2, 1000)
    monkeypatch.setattr(ordering, "SORTED_UP_TO", 999)
    assert np.array_equal(permutation(1, 2, 1000), FeistelPermutation(1, 2, 1000).slice(0, 1000))
    assert np.array_equal(permutation(1, 2, 999), np.argsort(words_of(1, 2, 999), kind="stable"))
    monkeypatch.setattr(ordering, "SORTED_UP_TO", 1000)
    assert np.array_equal(permutation(1, 2, 1000), before)


def words_of(seed: int, epoch: int, count: int) -> np.ndarray:
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.zeros(4, dtype=np.uint64)).random_raw(count)


def test_a_billion_images_take_no_memory() -> None:
    count = 10**9 + 7
    tracemalloc.start()
    order = EpochOrder(seed=3, count=count)
    seen = [order.batch(256 * step, 256) for step in (*range(40), 10**6, 2**40)]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    rows = np.concatenate(seen[:-1])
    assert len(np.unique(rows)) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < count
    # 41 batches of uniform places: the mean is within five standard deviations
    assert abs(rows.mean() / count - 0.5) < 5 * (1 / 12 / len(rows)) ** 0.5


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(0, 9), st.integers(0, 2**16), st.sampled_from(["sorted", "computed", "blocks"]))
def test_global_batches_are_equal_for_every_world_size_and_after_resume(
    seed: int, epoch: int, extra: int, kind: str
) -> None:
    """World sizes 1, 2, 3 and 8, each rank with an order object of its own, some of them resumed here."""
    batch = 24
    count = 24 * 3 + extra % 24
    blocks = block_starts(np.arange(count) * 3 // 2, 8) if kind == "blocks" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "SORTED_UP_TO", 1 if kind == "computed" else 2**26)
        whole = EpochOrder(seed=seed, count=count, blocks=blocks)
        first = epoch * 3 * batch
        expected = [whole.batch(first + step * batch, batch) for step in range(6)]
        for world in (1, 2, 3, 8):
            ranks = [EpochOrder(seed=seed, count=count, blocks=blocks) for _ in range(world)]
            for step in range(world % 4, 6):
                parts = [
                    rank_slice(order.batch(first + step * batch, batch), rank, world)
                    for rank, order in enumerate(ranks)
                ]
                assert np.array_equal(np.concatenate(parts), expected[step])
        for start in (0, 3):
            seen = np.concatenate(expected[start : start + 3])
            assert len(set(seen.tolist())) == 72
            assert cursor_of(first + start * batch, batch_size=batch, count=count).batch == 0


@settings(deadline=None, max_examples=100)
@given(SEEDS, EPOCHS, st.lists(st.integers(0, 200), min_size=1, max_size=120, unique=True), st.integers(1, 9))
def test_blocks_are_a_permutation_that_keeps_to_a_few_shards(
    seed: int, epoch: int, rows: list[int], shard_rows: int
) -> None:
    given_rows = np.sort(np.array(rows, dtype=np.int64))
    starts = block_starts(given_rows, shard_rows)
    order = BlockPermutation(seed, epoch, starts)
    places = order.slice(0, len(rows))
    assert np.array_equal(np.sort(places), np.arange(len(rows)))
    # windows of WINDOW_BLOCKS whole shards, one after the other
    shards = (given_rows[places] // shard_rows).tolist()
    windows = 0
    while shards:
        window = list(dict.fromkeys(shards))[:WINDOW_BLOCKS]
        size = sum(shards.count(shard) for shard in window)
        assert set(shards[:size]) == set(window)
        shards = shards[size:]
        windows += 1
    assert windows == -(-(len(starts) - 1) // WINDOW_BLOCKS)


@settings(deadline=None)
@given(SEEDS, EPOCHS, st.data())
def test_slices_of_blocks_are_those_of_the_whole(seed: int, epoch: int, data: st.DataObject) -> None:
    starts = block_starts(np.arange(100) * 2, 7)
    whole = BlockPermutation(seed, epoch, starts).slice(0, 100)
    order = BlockPermutation(seed, epoch, starts)
    for _ in range(5):
        start = data.draw(st.integers(0, 100))
        stop = data.draw(st.integers(start, 100))
        assert np.array_equal(order.slice(start, stop), whole[start:stop])


def test_blocks_are_shuffled_within_and_among() -> None:
    starts = block_starts(np.arange(64 * 32), 32)
    orders = np.stack([BlockPermutation(1, epoch, starts).slice(0, 64 * 32) for epoch in range(40)])
    assert len({order.tobytes() for order in orders}) == 40
    window = WINDOW_BLOCKS * 32
    for order in orders:
        shards = order.reshape(-1, window) // 32
        assert all(len(np.unique(each)) == WINDOW_BLOCKS for each in shards)
        # the four shards of a window are mixed: a batch of 32 meets all of them
        assert len(np.unique(shards[0, :32])) == WINDOW_BLOCKS
    # which shards come first differs: 160 draws of 64 shards leave few out
    assert len(np.unique(orders[:, :window] // 32)) > 48


def test_windows_are_shuffled_each_in_its_own_way() -> None:
    size = 32 * WINDOW_BLOCKS
    order = BlockPermutation(1, 0, block_starts(np.arange(64 * 32), 32)).slice(0, 64 * 32)
    drawn = BlockPermutation(1, 0, block_starts(np.arange(64 * 32), 32))._blocks.reshape(-1, WINDOW_BLOCKS)
    shuffles = set()
    for window, blocks in zip(order.reshape(-1, size), drawn, strict=True):
        before = np.concatenate([np.arange(32 * block, 32 * block + 32) for block in blocks])
        places = {row: place for place, row in enumerate(before.tolist())}
        shuffles.add(tuple(places[row] for row in window.tolist()))
    assert len(shuffles) == 64 // WINDOW_BLOCKS


def test_blocks_have_the_values_they_had() -> None:
    # golden: a resumed run must see the same order on every platform and with every NumPy
    order = BlockPermutation(3, 1, np.array([0, 2, 3, 6, 8, 9, 12]))
    assert order.slice(0, 12).tolist() == [2, 8, 11, 10, 9, 3, 5, 4, 1, 7, 6, 0]


def test_block_starts_leave_out_shards_without_rows() -> None:
    rows = np.array([0, 1, 9, 10, 11, 40], dtype=np.int64)
    assert block_starts(rows, 8).tolist() == [0, 2, 5, 6]
    assert block_starts(np.arange(3), 8).tolist() == [0, 3]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_outside_the_key_is_refused(seed: int) -> None:
    with pytest.raises(RepaError, match=r"seed .* is not between 0 and"):
        FeistelPermutation(seed, 0, 4)
    with pytest.raises(RepaError, match=r"seed .* is not between 0 and"):
        BlockPermutation(seed, 0, np.array([0, 4]))
