from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from repa.data.errors import CacheError, CorruptRowError, RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.format.layout import shard_file
from repa.data.reading import chosen_files as reader_module
from repa.data.reading.reader import CacheReader
from repa.data.storage import direct as direct_module
from repa.data.storage.direct import DirectFiles, direct_is_faster, fits_in_memory, supports_direct
from repa.data.storage.local import BufferedFiles
from repa.data.testing import expected_row, synthetic_cache

if TYPE_CHECKING:
    from pathlib import Path

MOMENTS = "sd-vae/moments"
PATCH = "demo/patch"
# rows longer than a block and shorter, none of them a multiple of one
COLUMNS = {
    MOMENTS: ColumnSpec(shape=(8, 16, 17), dtype="float32"),
    PATCH: ColumnSpec(shape=(3, 7), dtype="float16"),
}
VIEWS = ("original", "mirrored")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    synthetic_cache(path, num_rows=37, columns=COLUMNS, invalid={5: "text"}, views=VIEWS)
    if not supports_direct(str(shard_file(path, MOMENTS, COLUMNS[MOMENTS], 0))):
        pytest.skip("the file system of the temporary folder has no direct reads")
    return path


def read(reader: CacheReader, rows: np.ndarray, views: np.ndarray | None = None) -> dict[str, Any]:
    out = {
        column: np.full((len(rows), *spec.shape), np.nan, spec.numpy_dtype)
        for column, spec in COLUMNS.items()
    }
    with ThreadPoolExecutor(3) as pool:
        reader.read_rows(rows, list(COLUMNS), out, views=views, pool=pool, parts=5)
    return out


@pytest.mark.parametrize("check_crc", [True, False])
def test_direct_reads_give_the_same_rows(cache: Path, check_crc: bool) -> None:
    generator = np.random.default_rng(0)
    with CacheReader(cache, list(COLUMNS), direct="on", check_crc=check_crc) as reader:
        for _ in range(5):
            rows = generator.choice(reader.valid_rows, 50)
            views = generator.integers(0, 2, 50)
            out = read(reader, rows, views)
            assert isinstance(reader._files, DirectFiles)
            for column, values in out.items():
                for position, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
                    assert np.array_equal(
                        values[position], expected_row(column, row, COLUMNS[column], view=view)
                    )


def test_direct_reads_bypass_the_page_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = []
    opened = os.open

    def watched(path: Any, given: int, *rest: Any, **more: Any) -> int:
        if str(path).endswith("/0") and "label" not in str(path):
            flags.append(given)
        return opened(path, given, *rest, **more)

    with CacheReader(cache, list(COLUMNS), direct="on") as reader:
        monkeypatch.setattr(os, "open", watched)
        read(reader, reader.valid_rows)
    assert flags
    assert all(flag & os.O_DIRECT for flag in flags)


def test_corrupt_and_cut_files_are_named_by_direct_reads_too(cache: Path) -> None:
    path = shard_file(cache, MOMENTS, COLUMNS[MOMENTS], 2)
    data = bytearray(path.read_bytes())
    data[3 * 2 * (COLUMNS[MOMENTS].row_bytes + 4) + 4000] ^= 4
    path.write_bytes(data)
    rows = np.array([19, 18], dtype=np.int64)
    with CacheReader(cache, list(COLUMNS), direct="on") as reader:
        with pytest.raises(CorruptRowError) as caught:
            read(reader, rows)
        assert (caught.value.row, caught.value.column, caught.value.path) == (19, MOMENTS, str(path))
        path.write_bytes(data[:-1])
        reader.close()
        read(reader, rows[1:])  # its index is known, its bytes are there
        for size in (5000, 4096, 4000, 0):
            path.write_bytes(data[:size])
            reader.close()
            with pytest.raises(CorruptRowError, match="was cut off"):
                read(reader, rows[1:])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CacheError, match=r"not\s+wholly written"):
        CacheReader(cache, list(COLUMNS), direct="on")


@pytest.mark.parametrize("size", [0, 3, 100, 900])
def test_index_of_a_file_that_was_cut_is_refused(cache: Path, size: int) -> None:
    with CacheReader(cache, list(COLUMNS), direct="on") as reader:
        path = shard_file(cache, PATCH, COLUMNS[PATCH], 0)
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(CorruptRowError, match=r"row 0 of demo/patch is corrupt"):
            read(reader, np.array([0]))


def test_short_direct_reads_are_continued(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return whole(descriptor, [memoryview(buffers[0])[:4096]], offset)

    monkeypatch.setattr(os, "preadv", short)
    with CacheReader(cache, list(COLUMNS), direct="on") as reader:
        out = read(reader, reader.valid_rows[:9])
        for position, row in enumerate(reader.valid_rows[:9].tolist()):
            assert np.array_equal(out[MOMENTS][position], expected_row(MOMENTS, row, COLUMNS[MOMENTS]))


def test_file_system_without_direct_reads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "supports_direct", lambda path: False)
    monkeypatch.setattr(reader_module, "fits_in_memory", lambda size: False)
    reader = CacheReader(cache, list(COLUMNS), direct="on")
    with pytest.raises(RepaError, match="has no direct reads"):
        read(reader, reader.valid_rows)
    with CacheReader(cache, list(COLUMNS)) as reader:
        read(reader, reader.valid_rows)
        assert isinstance(reader._files, BufferedFiles)
        assert not isinstance(reader._files, DirectFiles)


@pytest.mark.parametrize(("faster", "fits"), [(True, False), (False, False), (True, True)])
def test_auto_takes_what_is_faster_once_memory_is_too_small(
    cache: Path, monkeypatch: pytest.MonkeyPatch, faster: bool, fits: bool
) -> None:
    asked: list[int] = []

    def decide(buffered: Any, direct: Any) -> bool:
        buffered(0)
        direct(1)
        return faster

    def size(total: int) -> bool:
        asked.append(total)
        return fits

    monkeypatch.setattr(reader_module, "direct_is_faster", decide)
    monkeypatch.setattr(reader_module, "fits_in_memory", size)
    with CacheReader(cache, list(COLUMNS)) as reader:
        assert reader._files is None
        out = read(reader, reader.valid_rows)
        assert isinstance(reader._files, DirectFiles) == (faster and not fits)
        # what was read to decide is not counted
        assert reader.bytes_read[PATCH] == 36 * COLUMNS[PATCH].row_bytes
        assert np.array_equal(out[PATCH][3], expected_row(PATCH, 3, COLUMNS[PATCH]))
    stored = sum(
        shard_file(cache, column, spec, shard).stat().st_size
        for column, spec in COLUMNS.items()
        for shard in range(5)
    )
    assert asked == [stored]


def test_a_bad_row_met_while_deciding_is_left_to_whoever_asks_for_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "fits_in_memory", lambda size: False)
    with CacheReader(cache, list(COLUMNS)) as reader:
        for shard in range(5):
            path = shard_file(cache, MOMENTS, COLUMNS[MOMENTS], shard)
            path.write_bytes(bytes(path.stat().st_size))
        out = {PATCH: np.empty((2, 3, 7), dtype=np.float16)}
        reader.read_rows(np.array([1, 2]), [PATCH], out)
        with pytest.raises(CorruptRowError, match=f"row 1 of {MOMENTS}"):
            read(reader, np.array([1, 2]))


def test_medians_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(direct_module.time, "perf_counter", lambda: clock[0])

    def takes(seconds: float) -> Any:
        def act(number: int) -> None:
            clock[0] += 100 * seconds if number < 2 else seconds  # one outlier each

        return act

    assert direct_is_faster(takes(2.0), takes(1.0))
    assert not direct_is_faster(takes(1.0), takes(1.0))
    assert not direct_is_faster(takes(1.1), takes(1.0))
    assert not direct_is_faster(takes(1.0), takes(2.0))


def test_what_fits_in_memory() -> None:
    assert fits_in_memory(1)
    assert not fits_in_memory(2**60)


def test_threads_have_memory_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(np.arange(40_000, dtype=np.uint16).tobytes())
    if not supports_direct(str(path)):
        pytest.skip("the file system of the temporary folder has no direct reads")
    files = DirectFiles(2)
    wrong = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(200):
            start, length = int(generator.integers(0, 39_000)), int(generator.integers(1, 900))
            chunk, checksum = bytearray(2 * length), bytearray(4)
            done = files.read(*files.open([str(path)]), 2 * start, memoryview(chunk), memoryview(checksum))
            values = np.frombuffer(bytes(chunk + checksum), dtype=np.uint16)
            if not done or not np.array_equal(values, np.arange(start, start + length + 2)):
                wrong.append((start, length))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    (handle,) = files.open([str(path)])
    assert files.tail(handle, 6) == (np.arange(39_997, 40_000, dtype=np.uint16).tobytes(), 80_000)
    assert not files.read(handle, 79_998, memoryview(bytearray(2)), memoryview(bytearray(4)))
    assert not files.read(handle, 2**40, memoryview(bytearray(2)), memoryview(bytearray(4)))
    files.close()


def test_unknown_choice_is_refused(cache: Path) -> None:
    with pytest.raises(RepaError, match="direct=fast is not valid: expected one of auto, on, off"):
        CacheReader(cache, list(COLUMNS), direct="fast")
