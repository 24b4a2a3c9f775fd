"""Processes that read together: each its share of one order, with figures that are sums over them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numbered import Numbered
from repa.commands.bench.forms import FORMS
from repa.commands.bench.loader import BATCH_SIZE
from repa.commands.bench.measured import BenchSettings
from repa.commands.bench.ranks import EPOCHS, Copying, InSequence, Reading, bench_ranks
from repa.commands.bench.run import bench
from repa.commands.measure.together import Alone, Place, Processes, Share, Together, processes
from repa.data.errors import RepaError
from repa.data.testing import synthetic_cache

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNT = 2


@pytest.fixture(scope="module")
def started() -> Iterator[Processes]:
    with processes(COUNT, preload=["repa.commands.bench.ranks"]) as found:
        yield found


def test_figures_are_sums_over_the_processes() -> None:
    together = Together(
        (Share(rows=30, started=1.0, stopped=3.0, cpu=0.5), Share(rows=10, started=2.0, stopped=5.0, cpu=1.5))
    )
    assert together.rows == 40
    assert together.seconds == 4.0
    assert together.rate == 10.0
    assert together.cpu_per_1000 == 50.0


def test_every_process_measures_its_share(started: Processes) -> None:
    found = started.measure(Numbered())
    assert [share.rows for share in found.shares] == [20, 21]
    assert all(share.memory == 7 and share.stopped >= share.started for share in found.shares)
    # none begins before all have come
    assert max(share.started for share in found.shares) >= min(share.started for share in found.shares)


def test_what_one_process_refuses_is_said_and_the_others_wait_for_nobody() -> None:
    with processes(COUNT) as found, pytest.raises(RepaError) as caught:
        found.measure(Numbered(refused=True))
    assert caught.value.field == "--rows"


def test_a_rank_reads_its_share_and_copies_as_many(tmp_path: Path, started: Processes) -> None:
    rows = 2 * COUNT * BATCH_SIZE
    cache = tmp_path / "cache"
    columns = ("sd-vae/moments", "demo/patch")
    manifest = synthetic_cache(cache, num_rows=rows, shard_rows=64)
    each = rows // COUNT
    cold = started.measure(Reading(cache, columns, 1))
    assert [share.rows for share in cold.shares] == [each, each]
    warm = started.measure(Reading(cache, columns, 2, check_crc=False, warm=True))
    assert [share.rows for share in warm.shares] == [EPOCHS * each] * COUNT
    # both columns' shards are open, and the opening is no part of what was timed
    assert all(share.open_files >= 2 * manifest.num_shards and share.opening > 0 for share in warm.shares)
    whole = started.measure(Reading(cache, columns, 1, alone=True))
    assert [share.rows for share in whole.shares] == [rows] * COUNT
    plain = tmp_path / "plain.npy"
    np.save(plain, np.arange(rows * 5, dtype=np.uint8).reshape(rows, 5))
    assert [share.rows for share in started.measure(Copying(plain, 5)).shares] == [EPOCHS * each] * COUNT


def test_files_are_shared_out_once_each(tmp_path: Path) -> None:
    files = []
    for number, size in enumerate((4096, 8192, 10_000)):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(bytes(size))
    counted = [InSequence(tuple(files), 2)(Place(number, COUNT, Alone())).rows for number in range(COUNT)]
    assert counted == [(4096 + 10_000) // 2, 8192 // 2]


def test_the_bench_measures_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form, columns in FORMS.items():
        shapes = {name: tuple(side // 4 for side in spec.shape) for name, spec in columns.items()}
        small = {name: replace(spec, shape=shapes[name]) for name, spec in columns.items()}
        monkeypatch.setitem(FORMS, form, small)
    settings = BenchSettings(rows=COUNT * BATCH_SIZE + 1, rounds=1, processes=COUNT)
    tables = list(bench_ranks(settings, tmp_path))
    # float16 and int8, warm and cold: the limit, and two numbers of threads, each in two ways
    assert [len(lines) for _, _, lines in tables] == [5, 5, 5, 5]
    for title, _, lines in tables:
        assert "128 rows" in title
        assert ("each of 2 processes read all" in title) == ("warm" not in title)
        assert all(line.median > 0 and min(line.cpu_per_1000) > 0 for line in lines)
        assert [line.open_files > 0 for line in lines] == [False, True, True, True, True]
        assert [line.opening_seconds > 0 for line in lines] == [False, True, True, True, True]
    assert list(tmp_path.iterdir()) == []


def test_no_process_and_processes_of_another_part_are_refused() -> None:
    with pytest.raises(RepaError) as caught:
        BenchSettings(processes=0)
    assert caught.value.field == "--processes"
    with pytest.raises(RepaError) as caught:
        bench(["writer"], BenchSettings(processes=2))
    assert caught.value.field == "--processes"
