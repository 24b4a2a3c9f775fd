"""Who feeds a training follows from given figures; the page cache is read whole, and nothing is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from repa.commands.measure.feeding import Feeding, PageCacheReading, measure_page_cache, verdict
from repa.commands.measure.together import Alone, Place

# 1,000 images of 1,000 bytes, a megabyte, read by 8 ranks at 10 or 2 images a millisecond
FOUND = Feeding(
    images=1000,
    bytes=1_000_000,
    row_bytes=1000,
    memory=2_000_000,
    cached=10e6,
    disk=2e6,
    needed=5000.0,
    ranks=8,
    as_float=True,
)


def test_what_half_of_the_memory_holds_is_read_from_it() -> None:
    assert FOUND.fits
    assert FOUND.given == 10_000
    assert FOUND.suffices
    line = verdict(FOUND)
    assert "take 1 MB" in line
    assert "8 ranks at 10000 images/s, 2 times what is needed" in line
    # the first epoch comes from the disk
    assert "40% of it" in line
    assert "40%" not in verdict(replace(FOUND, disk=5e6))


def test_what_it_does_not_hold_is_the_disks_to_give() -> None:
    found = replace(FOUND, memory=1_999_998)
    assert not found.fits
    assert found.given == 2000
    assert not found.suffices
    line = verdict(found)
    assert "must give 5 MB/s; it gives 2 MB/s" in line
    assert all(word in line for word in ("--feature-dtype int8", "order=blocks", "more machines"))
    assert "int8" not in verdict(replace(found, as_float=False))
    enough = replace(found, needed=2000.0)
    assert enough.suffices
    assert "more machines" not in verdict(enough)


def test_a_page_cache_that_is_too_slow_is_said_without_the_disks_remedies() -> None:
    found = replace(FOUND, needed=20_000.0)
    assert not found.suffices
    assert "50% of what is needed" in verdict(found)
    assert "faster disk" not in verdict(found)


def test_what_is_not_known_is_not_judged() -> None:
    found = replace(FOUND, needed=None)
    assert found.suffices is None
    assert "needed" not in verdict(found)
    assert verdict(replace(found, memory=0)).endswith("the disk feeds 8 ranks at 2000 images/s")
    unknown = replace(FOUND, memory=None)
    assert not unknown.fits
    assert "not known" in verdict(unknown)


def test_a_rank_reads_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows"
    rows = np.arange(100, dtype=np.uint8).repeat(7)
    file.write_bytes(rows.tobytes() + b"rest")
    seen: list[int] = []
    monkeypatch.setattr("repa.commands.measure.feeding.crc32c", lambda row: seen.append(bytes(row)[6]))
    share = PageCacheReading(file, 7, 704)(Place(0, 1, Alone()))
    assert share.rows == 100
    assert sorted(seen) == list(range(100))


def test_the_scratch_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repa.commands.measure.disk._SCRATCH_BYTES", 8_000_000)
    monkeypatch.setattr("repa.commands.measure.feeding.scratch_bytes_of", lambda folder: 8_000_000)
    rate = measure_page_cache(tmp_path, row_bytes=100_000, ranks=1)
    assert rate is not None
    assert rate > 0
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("repa.commands.measure.feeding.scratch_bytes_of", lambda folder: 0)
    assert measure_page_cache(tmp_path, row_bytes=100, ranks=1) is None
