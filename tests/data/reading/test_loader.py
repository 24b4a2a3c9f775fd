"""Which rows, views and columns the batches hold: for any threads, ranks, phases, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.data.errors import CacheError, RepaError
from repa.data.reading import order as ordering
from repa.data.reading.reader import CacheReader
from repa.data.testing import expected_row, synthetic_cache
from small_loader import COLUMNS, MOMENTS, NUM_ROWS, PATCH, check, global_batch, loader_threads, make

if TYPE_CHECKING:
    from collections.abc import Sequence


pytestmark = pytest.mark.usefixtures("no_loader_thread_is_left")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_hold_the_rows_of_the_order(small_reader: CacheReader, threads: int, prefetch: int) -> None:
    loader = make(small_reader, threads=threads, prefetch=prefetch, last_image=24 * 7)
    seen = 0
    for step, batch in enumerate(loader):
        assert (batch.step, batch.micro, batch.images_seen) == (step, 0, seen + 24)
        assert batch.rows.tolist() == global_batch(small_reader, seen)
        assert list(batch.columns) == list(COLUMNS)
        check(batch)
        seen += 24
        assert loader.images_seen == seen
    assert seen == 24 * 7
    # finished: iterating again gives nothing more
    assert list(loader) == []


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(
    small_reader: CacheReader, world: int, accumulate: int
) -> None:
    ranks = [
        list(
            make(
                small_reader, batch_size=48, rank=rank, world=world, accumulate=accumulate, last_image=48 * 4
            )
        )
        for rank in range(world)
    ]
    for step in range(4):
        rows: list[int] = []
        for batches in ranks:
            for micro in range(accumulate):
                batch = batches[step * accumulate + micro]
                assert (batch.step, batch.micro) == (step, micro)
                assert len(batch.rows) == 48 // world // accumulate
                check(batch)
                rows += batch.rows.tolist()
        assert rows == global_batch(small_reader, 48 * step, 48)


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8])
def test_resumed_on_other_ranks_the_batches_are_the_same(small_reader: CacheReader, stop: int) -> None:
    first = make(small_reader, rank=1, world=2)
    stream = iter(first)
    for _ in range(stop):
        next(stream)
    state = first.state_dict()
    assert state == {"images_seen": 24 * stop}
    first.close()
    later = []
    for rank in range(3):
        resumed = make(small_reader, rank=rank, world=3, last_image=24 * (stop + 3))
        resumed.load_state_dict(state)
        later.append(list(resumed))
    for step in range(3):
        rows = [row for batches in later for row in batches[step].rows.tolist()]
        assert rows == global_batch(small_reader, 24 * (stop + step))
        assert later[0][step].step == stop + step


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("order", ["full", "blocks"])
def test_every_order_gives_equal_batches_on_any_ranks_and_after_resume(
    small_reader: CacheReader, monkeypatch: pytest.MonkeyPatch, order: str, computed: bool
) -> None:
    if computed:
        monkeypatch.setattr(ordering, "SORTED_UP_TO", 1)
    expected = [batch.rows.tolist() for batch in make(small_reader, order=order, last_image=24 * 9)]
    for epoch in (expected[0:2], expected[2:4]):
        rows = [row for batch in epoch for row in batch]
        assert len(set(rows)) == 48
        assert 7 not in rows
    shards = {row // small_reader.manifest.shard_rows for row in expected[0]}
    assert len(shards) == 4 if order == "blocks" else len(shards) > 4
    for world in (2, 3, 8):
        resumed = [
            make(small_reader, order=order, rank=rank, world=world, images_seen=24 * world, last_image=24 * 9)
            for rank in range(world)
        ]
        steps = zip(*map(list, resumed), strict=True)
        got = [[row for batch in step for row in batch.rows.tolist()] for step in steps]
        assert got == expected[world:]


def test_iterating_again_goes_on(small_reader: CacheReader) -> None:
    loader = make(small_reader, prefetch=3)
    for batch in loader:
        if batch.step == 2:
            break
    assert loader_threads() == []
    assert next(iter(loader)).rows.tolist() == global_batch(small_reader, 24 * 3)
    # a step begun but not finished is begun again
    accumulating = make(small_reader, accumulate=4)
    stream = iter(accumulating)
    assert [(each.step, each.micro) for each in (next(stream) for _ in range(6))][-1] == (1, 1)
    assert accumulating.images_seen == 24
    again = next(iter(accumulating))
    assert (again.step, again.micro) == (1, 0)
    with pytest.raises(StopIteration):
        next(stream)
    del stream
    accumulating.close()


def test_another_batch_size_after_resume(small_reader: CacheReader) -> None:
    # 24 images are two steps of 10 and four images more: the order goes on as that of batches of 10
    resumed = make(small_reader, batch_size=10, images_seen=24, last_image=54)
    batches = list(resumed)
    assert [batch.step for batch in batches] == [2, 3, 4]
    assert [batch.images_seen for batch in batches] == [34, 44, 54]
    for batch in batches:
        assert batch.rows.tolist() == global_batch(small_reader, batch.step * 10, 10)


def test_length_is_that_of_the_whole_run(small_reader: CacheReader) -> None:
    assert len(make(small_reader, last_image=24 * 5, images_seen=48, accumulate=2)) == 10
    assert len(make(small_reader, last_image=24 * 5 + 1)) == 6
    assert len(list(make(small_reader, last_image=24 * 5 + 1))) == 6
    with pytest.raises(TypeError, match="no length"):
        len(make(small_reader))


def test_columns_follow_the_phase(small_cache: Path) -> None:
    asked = []

    def columns_at(step: int) -> Sequence[str]:
        asked.append(step)
        return [MOMENTS, PATCH, "label"] if step < 4 else [MOMENTS]

    with CacheReader(small_cache, list(COLUMNS)) as reader:
        loader = make(reader, columns_at=columns_at, prefetch=3, last_image=24 * 9)
        for batch in loader:
            check(batch)
            assert list(batch.columns) == ([MOMENTS, PATCH] if batch.step < 4 else [MOMENTS])
        assert asked == list(range(9))
        # not a byte of the teacher's past the phase, although batches were in flight when it ended
        assert reader.bytes_read == {
            MOMENTS: 9 * 24 * COLUMNS[MOMENTS].row_bytes,
            PATCH: 4 * 24 * COLUMNS[PATCH].row_bytes,
        }


def test_nothing_is_read_before_it_is_asked_for_and_little_ahead(small_cache: Path) -> None:
    with CacheReader(small_cache, list(COLUMNS)) as reader:
        loader = make(reader, prefetch=2)
        stream = iter(loader)
        assert reader.bytes_read == dict.fromkeys(COLUMNS, 0)
        assert loader_threads() == []
        next(stream)
        loader.close()
        assert reader.bytes_read[PATCH] <= 3 * 24 * COLUMNS[PATCH].row_bytes


def test_views_are_one_draw_for_all_columns(tmp_path: Path) -> None:
    views = ("original", "mirrored")
    synthetic_cache(tmp_path / "cache", num_rows=32, columns=COLUMNS, views=views)
    with CacheReader(tmp_path / "cache", list(COLUMNS)) as reader:
        batches = list(make(reader, batch_size=16, last_image=64))
        halves = [list(make(reader, batch_size=16, last_image=64, world=2, rank=rank)) for rank in range(2)]
        quarters = list(make(reader, batch_size=16, last_image=64, accumulate=4))
        (fixed,) = make(reader, batch_size=16, last_image=16, view=1)
    assert fixed.views.tolist() == [1] * 16
    assert fixed.rows.tolist() == batches[0].rows.tolist()
    for position, row in enumerate(fixed.rows.tolist()):
        expected = expected_row(PATCH, row, COLUMNS[PATCH], view=1)
        assert np.array_equal(fixed.columns[PATCH][position].numpy(), expected)
    drawn = []
    for step, batch in enumerate(batches):
        for position, row in enumerate(batch.rows.tolist()):
            matches = [
                [
                    np.array_equal(
                        values[position].numpy(), expected_row(column, row, COLUMNS[column], view=view)
                    )
                    for view in range(2)
                ]
                for column, values in batch.columns.items()
            ]
            assert matches in ([[True, False]] * 2, [[False, True]] * 2)
            drawn.append(matches[0].index(True))
        assert batch.views.tolist() == drawn[-16:]
        assert torch.cat([half[step].views for half in halves]).tolist() == drawn[-16:]
        micros = [each for each in quarters if each.step == step]
        assert torch.cat([each.views for each in micros]).tolist() == drawn[-16:]
        joined = torch.cat([half[step].columns[PATCH] for half in halves])
        assert torch.equal(joined, batch.columns[PATCH])
    assert 10 < sum(drawn) < 54


def test_column_that_is_not_there_is_refused(small_reader: CacheReader) -> None:
    with pytest.raises(CacheError, match="no column dinov2-b/patch"):
        next(iter(make(small_reader, columns_at=lambda step: [MOMENTS, "dinov2-b/patch"])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 25, "world": 2}, "2 ranks × 1 micro-batch; set --batch-size to a multiple of 2"),
        ({"batch_size": 24, "world": 2, "accumulate": 5}, "multiple of 10"),
        ({"batch_size": 61}, "a batch of 61 images is larger than the 60 images"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"threads": 0}, "at least 1"),
        ({"order": "sorted"}, "order 'sorted' is unknown; there are full, blocks"),
        ({"prefetch": 0}, "at least 1"),
        ({"images_seen": -24}, "images seen"),
        ({"rows": np.arange(NUM_ROWS)}, "row 7 of cache .* is invalid"),
    ],
)
def test_impossible_options_are_refused(
    small_reader: CacheReader, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RepaError, match=message):
        make(small_reader, **options)


def test_float16_stays_float16_and_the_label_int64(small_reader: CacheReader) -> None:
    batch = next(iter(make(small_reader)))
    assert batch.columns[PATCH].dtype == torch.float16
    assert batch.columns[PATCH].shape == (24, 4, 16)
    assert batch.columns[MOMENTS].dtype == torch.float32
    assert batch.label.dtype == torch.int64
