"""Statistics of a column: by hand, of spaced rows, of a channel that never varies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from repa.data.format.columns import ColumnSpec
from repa.data.reading.reader import CacheReader
from repa.data.testing import expected_row, synthetic_cache
from repa.trainer.input import statistics
from repa.trainer.input.statistics import column_statistics

SPEC = ColumnSpec(shape=(16,), dtype="float16")


def by_hand(rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    values = np.stack([expected_row("demo/cls", row, SPEC) for row in rows]).astype(np.float64)
    return values.mean(0), values.std(0)


@pytest.mark.parametrize("chunk", [2, 1024])
def test_against_a_loop(cache: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", chunk)
    rows = [1, 2, 7, 9, 30]
    with CacheReader(cache, ("demo/cls",)) as reader:
        mean, std = column_statistics(reader, "demo/cls", np.array(rows))
        for found, expected in zip((mean, std), by_hand(rows), strict=True):
            assert found.numpy() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_spaced_rows_from_the_first_to_the_last(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MOST_ROWS", 3)
    with CacheReader(cache, ("demo/cls",)) as reader:
        mean, _ = column_statistics(reader, "demo/cls", np.arange(10, 19))
    assert mean.numpy() == pytest.approx(by_hand([10, 14, 18])[0], rel=1e-6, abs=1e-7)


def test_all_views_count(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=12, views=("original", "mirrored"))
    values = [expected_row("demo/cls", row, SPEC, view=view) for row in (2, 7, 9) for view in range(2)]
    with CacheReader(tmp_path / "cache", ("demo/cls",)) as reader:
        mean, std = column_statistics(reader, "demo/cls", np.array([2, 7, 9]))
    both = np.stack(values).astype(np.float64)
    assert mean.numpy() == pytest.approx(both.mean(0), rel=1e-6, abs=1e-7)
    assert std.numpy() == pytest.approx(both.std(0), rel=1e-6)


def test_a_channel_that_never_varies(cache: Path) -> None:
    with CacheReader(cache, ("demo/cls",)) as reader:
        mean, std = column_statistics(reader, "demo/cls", np.array([4]))
    assert (std == 1).all()
    assert mean.numpy() == pytest.approx(by_hand([4])[0])
