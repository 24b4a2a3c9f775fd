"""Rows that are not in the page cache are asked for all at once, then waited for; kernels without that."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from repa.data.errors import CacheError
from repa.data.format.columns import ColumnSpec
from repa.data.format.layout import shard_file
from repa.data.reading.reader import CacheReader
from repa.data.storage import local as shard_files
from repa.data.storage.local import BufferedFiles, open_files_limit
from repa.data.testing import expected_row, synthetic_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

MOMENTS = "sd-vae/moments"
PATCH = "demo/patch"
COLUMNS = {
    MOMENTS: ColumnSpec(shape=(8, 4, 4), dtype="float32"),
    PATCH: ColumnSpec(shape=(4, 16), dtype="float16"),
}
ROWS = 90

pytestmark = pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="reads that do not wait are Linux's")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cold") / "cache"
    synthetic_cache(path, num_rows=ROWS, columns=COLUMNS)
    return path


class Kernel:
    """``preadv`` and ``posix_fadvise`` as a kernel might do them; the calls in order, by what they want."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, without_waiting: Callable[..., int]) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self._without_waiting = without_waiting
        self._preadv, self._fadvise = os.preadv, os.posix_fadvise
        monkeypatch.setattr(os, "preadv", self.preadv)
        monkeypatch.setattr(os, "posix_fadvise", self.fadvise)

    def preadv(self, handle: int, parts: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        total = sum(len(part) for part in parts)
        self.calls.append(("try" if flags & os.RWF_NOWAIT else "read", offset, total))
        if flags & os.RWF_NOWAIT:
            return self._without_waiting(handle, parts, offset)
        return self._preadv(handle, parts, offset)

    def fadvise(self, handle: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        self.calls.append(("ask", offset, length))
        self._fadvise(handle, offset, length, advice)

    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.calls]


def check(reader: CacheReader, rows: np.ndarray) -> None:
    out: dict[str, Any] = {
        column: np.full((len(rows), *spec.shape), np.nan, spec.numpy_dtype)
        for column, spec in COLUMNS.items()
    }
    reader.read_rows(rows, list(COLUMNS), out)
    for column, spec in COLUMNS.items():
        expected = np.stack([expected_row(column, row, spec) for row in rows.tolist()])
        assert np.array_equal(out[column], expected)


def test_rows_in_memory_take_one_call_each(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    with CacheReader(cache, list(COLUMNS), direct="off") as reader:
        rows = np.random.default_rng(0).permutation(ROWS)[:40]
        check(reader, rows)
        assert isinstance(reader._files, BufferedFiles)
        if not reader._files._can_try:
            pytest.skip("the file system of the temporary folder cannot be asked what is in memory")
        kernel = Kernel(monkeypatch, lambda handle, parts, offset: whole(handle, parts, offset))
        check(reader, rows)
    assert kernel.kinds() == ["try"] * 80


def would_block(*_: Any) -> int:
    raise BlockingIOError(errno.EAGAIN, "not in memory")


def test_rows_of_a_disk_are_all_asked_for_before_the_first_is_waited_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(monkeypatch, would_block)
    with CacheReader(cache, list(COLUMNS), direct="off") as reader:
        check(reader, np.random.default_rng(1).permutation(ROWS)[:30])
    # 30 rows of 2 columns; a read without a chunk's bytes is none of ours
    assert kernel.kinds() == ["try", "ask"] * 60 + ["read"] * 60
    tried, read = kernel.calls[0:120:2], kernel.calls[120:]
    assert [call[1:] for call in tried] == [call[1:] for call in kernel.calls[1:120:2]]
    assert [call[1:] for call in tried] == [call[1:] for call in read]


def test_a_row_that_is_half_in_memory_is_read_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv

    def half(handle: int, parts: Sequence[memoryview], offset: int) -> int:
        return whole(handle, [parts[0][:50]], offset)

    kernel = Kernel(monkeypatch, half)
    with CacheReader(cache, list(COLUMNS), direct="off") as reader:
        check(reader, np.arange(20))
    assert kernel.kinds().count("read") == 40


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_where_reads_cannot_be_tried_they_are_not_tried_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    kernel = Kernel(monkeypatch, refuse)
    with CacheReader(cache, list(COLUMNS), direct="off") as reader:
        check(reader, np.arange(50))
    assert kernel.kinds().count("try") == 1
    assert kernel.kinds().count("read") == 100


def test_an_error_of_the_disk_names_row_and_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = 3 * (COLUMNS[MOMENTS].row_bytes + 4)
    whole = os.preadv
    lasting = True

    def fails(handle: int, parts: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if offset == broken and (lasting or flags):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(handle, parts, offset)

    monkeypatch.setattr(os, "preadv", fails)
    with CacheReader(cache, [MOMENTS], direct="off") as reader:
        rows = np.array([9, 11, 13])
        out = {MOMENTS: np.zeros((3, 8, 4, 4), np.float32)}
        path = shard_file(cache, MOMENTS, COLUMNS[MOMENTS], 1)
        with pytest.raises(
            CacheError, match=rf"row 11 of {MOMENTS} cannot be read from {path}: Input/output"
        ):
            reader.read_rows(rows, [MOMENTS], out)
        # one that is gone when the row is asked for again is none
        lasting = False
        reader.read_rows(rows, [MOMENTS], out)
        for got, row in zip(out[MOMENTS], rows.tolist(), strict=True):
            assert np.array_equal(got, expected_row(MOMENTS, row, COLUMNS[MOMENTS]))


def test_a_missing_file_is_named_with_its_first_row(cache: Path, tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=40, columns=COLUMNS)
    with CacheReader(tmp_path / "cache", [PATCH]) as reader:
        path = shard_file(tmp_path / "cache", PATCH, COLUMNS[PATCH], 2)
        path.unlink()
        out = {PATCH: np.empty((4, 4, 16), np.float16)}
        with pytest.raises(CacheError, match=rf"row 17 of {PATCH} cannot be read from {path}: No such file"):
            reader.read_rows(np.array([1, 20, 17, 30]), [PATCH], out)


FEW_FILES = """
import resource, sys
import numpy as np
from repa.data.reading.loader import CacheLoader
from repa.data.reading.reader import CacheReader
from repa.data.testing import expected_row

path, allowed, threads, *columns = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(allowed), int(allowed)))
reader = CacheReader(path, columns)
loader = CacheLoader(
    reader,
    rows=reader.valid_rows,
    batch_size=200,
    columns_at=lambda step: columns,
    last_image=600,
    threads=int(threads),
)
for batch in loader:
    for name, values in batch.columns.items():
        spec = reader.manifest.columns[name]
        for row, value in zip(batch.rows.tolist(), values.numpy(), strict=True):
            assert np.array_equal(value, expected_row(name, row, spec))
print(loader.images_seen)
"""


@pytest.mark.parametrize(("allowed", "threads"), [(64, 2), (128, 4)])
def test_a_process_that_may_open_few_files_reads_many(tmp_path: Path, allowed: int, threads: int) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=200, shard_rows=2, columns=COLUMNS)  # 200 files
    command = [sys.executable, "-c", FEW_FILES, tmp_path / "cache", allowed, threads, *COLUMNS]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "600"), done.stderr


@pytest.mark.parametrize(
    ("allowed", "limit"),
    [(1024, 512), (100, 50), (10, 8), (20_000, 8192), (resource.RLIM_INFINITY, 8192)],
)
def test_half_of_the_files_a_process_may_open_are_held(
    monkeypatch: pytest.MonkeyPatch, allowed: int, limit: int
) -> None:
    monkeypatch.setattr(shard_files.resource, "getrlimit", lambda kind: (allowed, resource.RLIM_INFINITY))
    assert open_files_limit() == limit
