from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repa.data.errors import CacheError, CorruptRowError
from repa.data.format.columns import ColumnSpec
from repa.data.format.layout import commit_file, shard_file
from repa.data.reading.reader import CacheReader
from repa.data.storage.descriptors import DescriptorCache
from repa.data.storage.local import BufferedFiles
from repa.data.testing import expected_labels, expected_row, synthetic_cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MOMENTS = "sd-vae/moments"
PATCH = "demo/patch"
CLS = "demo/cls"
COLUMNS = {
    MOMENTS: ColumnSpec(shape=(8, 4, 4), dtype="float32"),
    PATCH: ColumnSpec(shape=(4, 16), dtype="float16"),
    CLS: ColumnSpec(shape=(16,), dtype="float16"),
}
NUM_ROWS = 37
INVALID = {5: "text", 36: "cut off"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "cache"
    synthetic_cache(path, num_rows=NUM_ROWS, columns=COLUMNS, invalid=INVALID, views=("original", "mirrored"))
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "cache"
    synthetic_cache(path, num_rows=20, columns=COLUMNS)
    return path


@pytest.fixture
def own_cache(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "cache"))


def buffers(count: int, columns: Sequence[str] = tuple(COLUMNS)) -> dict[str, NDArray[Any]]:
    # filled with what no row holds, so that an unread row shows
    return {
        column: np.full((count, *COLUMNS[column].shape), np.nan, COLUMNS[column].numpy_dtype)
        for column in columns
    }


def check(
    out: dict[str, NDArray[Any]], rows: NDArray[np.int64], views: NDArray[np.int64] | None = None
) -> None:
    for column, values in out.items():
        for place, row in enumerate(rows.tolist()):
            view = 0 if views is None else int(views[place])
            assert np.array_equal(values[place], expected_row(column, row, COLUMNS[column], view=view))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), parts=st.integers(1, 5), check_crc=st.booleans())
def test_rows_come_in_the_order_asked_for(
    cache: Path, data: st.DataObject, parts: int, check_crc: bool
) -> None:
    valid = sorted(set(range(NUM_ROWS)) - set(INVALID))
    rows = np.array(data.draw(st.lists(st.sampled_from(valid), max_size=50)), dtype=np.int64)
    drawn = data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    views = np.array(drawn, dtype=np.int64)
    columns = data.draw(st.lists(st.sampled_from(list(COLUMNS)), unique=True))
    with CacheReader(cache, list(COLUMNS), check_crc=check_crc) as reader, ThreadPoolExecutor(2) as pool:
        out = buffers(len(rows), columns)
        reader.read_rows(rows, columns, out, views=views, pool=pool, parts=parts)
        check(out, rows, views)
        assert reader.bytes_read == {
            column: spec.row_bytes * len(rows) if column in columns else 0 for column, spec in COLUMNS.items()
        }


def test_facts_of_the_cache(cache: Path) -> None:
    reader = CacheReader(cache, [PATCH, "label", PATCH])
    assert reader.columns == (PATCH,)
    assert reader.labels.dtype == np.int32
    assert np.array_equal(reader.labels, expected_labels(NUM_ROWS, 3))
    assert reader.invalid_rows.tolist() == [5, 36]
    assert reader.valid_rows.dtype == np.int64
    assert reader.valid_rows.tolist() == [row for row in range(NUM_ROWS) if row not in INVALID]
    assert reader.manifest.num_rows == NUM_ROWS


def test_without_a_pool_the_calling_thread_reads(cache: Path) -> None:
    before = set(threading.enumerate())
    rows = np.array([30, 2, 2, 17], dtype=np.int64)
    with CacheReader(cache, list(COLUMNS)) as reader:
        out = buffers(4)
        reader.read_rows(rows, list(COLUMNS), out)
        assert set(threading.enumerate()) <= before
    check(out, rows)


def test_many_threads_share_few_descriptors(cache: Path) -> None:
    reader = CacheReader(cache, list(COLUMNS), max_open_files=1)

    def read(seed: int) -> None:
        rows = np.random.default_rng(seed).choice(reader.valid_rows, 40)
        out = buffers(40)
        reader.read_rows(rows, list(COLUMNS), out)
        check(out, rows)
        assert len(reader._files) == 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(48)))
    assert len(reader._files) == 1
    reader.close()
    assert len(reader._files) == 0
    read(1)


def open_descriptors(folder: Path) -> int:
    links = (os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd"))
    return sum(link.startswith(str(folder)) for link in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_descriptors_are_bounded_and_closed(cache: Path) -> None:
    reader = CacheReader(cache, list(COLUMNS), max_open_files=4)
    reader.read_rows(reader.valid_rows, list(COLUMNS), buffers(len(reader.valid_rows)))
    assert open_descriptors(cache) == 4
    del reader
    assert open_descriptors(cache) == 0


def test_the_file_opened_first_is_closed(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        (tmp_path / path).write_text(path)
    files = DescriptorCache(2)
    for path in (paths[0], paths[1], paths[0], paths[2]):
        assert os.pread(files.open(path).descriptor, 999, 0).decode() == path
    assert list(files._files) == [paths[1], paths[2]]
    assert open_descriptors(tmp_path) == 2
    # all in use: none may be closed, whatever the limit
    used = [files.open(path) for path in paths]
    assert [os.pread(each.descriptor, 999, 0).decode() for each in used] == paths
    assert (len(files), open_descriptors(tmp_path)) == (2, 3)
    files.close()
    assert (len(files), open_descriptors(tmp_path)) == (0, 3)
    del used
    assert open_descriptors(tmp_path) == 0
    with pytest.raises(FileNotFoundError) as caught:
        files.open(str(tmp_path / "absent"))
    assert caught.value.filename == str(tmp_path / "absent")
    with pytest.raises(ValueError, match="at least 1"):
        DescriptorCache(0)


def read_in_child(reader: CacheReader, queue: Any) -> None:
    rows = np.array([3, 33, 8], dtype=np.int64)
    out = buffers(3)
    with ThreadPoolExecutor(2) as pool:
        reader.read_rows(rows, list(COLUMNS), out, pool=pool, parts=2)
    queue.put({column: values.tobytes() for column, values in out.items()})


# Python ≥ 3.12 warns of any fork beside threads; the locks are what is tested here
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_reader_works_in_a_forked_process(cache: Path) -> None:
    rows = np.array([3, 33, 8], dtype=np.int64)
    with CacheReader(cache, list(COLUMNS)) as reader:
        out = buffers(3)
        reader.read_rows(rows, list(COLUMNS), out)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        # as if a thread that does not exist in the child held the locks
        assert isinstance(reader._files, BufferedFiles)
        with reader._lock, reader._files._files._lock:
            child = context.Process(target=read_in_child, args=(reader, queue))
            child.start()
        received = queue.get(timeout=600)
        child.join()
        queue.close()
        queue.join_thread()
        assert child.exitcode == 0
        assert received == {column: values.tobytes() for column, values in out.items()}


def test_reader_works_in_a_new_process(cache: Path) -> None:
    """What a spawned process gets is the pickled reader; this module is not importable there."""
    code = (
        "import pickle, sys, numpy as np\n"
        "reader = pickle.load(sys.stdin.buffer)\n"
        "spec = reader.manifest.columns[sys.argv[1]]\n"
        "out = np.empty((3, *spec.shape), spec.numpy_dtype)\n"
        "reader.read_rows(np.array([3, 33, 8]), sys.argv[1:], {sys.argv[1]: out})\n"
        "sys.stdout.buffer.write(out.tobytes())\n"
    )
    with CacheReader(cache, list(COLUMNS)) as reader:
        out = buffers(3, [PATCH])
        reader.read_rows(np.array([3, 33, 8], dtype=np.int64), [PATCH], out)
        command = [sys.executable, "-c", code, PATCH]
        done = subprocess.run(command, input=pickle.dumps(reader), capture_output=True, check=True, cwd="/")
    assert done.stdout == out[PATCH].tobytes()


def test_pickled_reader_keeps_its_options(cache: Path) -> None:
    copy = pickle.loads(pickle.dumps(CacheReader(cache, [PATCH], check_crc=False, max_open_files=3)))
    assert (copy.path, copy.columns, copy.check_crc, copy.max_open_files) == (cache, (PATCH,), False, 3)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def chunk_position(row: int, column: str) -> int:
    """First byte of a row in its shard: chunks lie one after another, each with 4 bytes of checksum."""
    return (row % 8) * (COLUMNS[column].row_bytes + 4)


@pytest.mark.parametrize("column", list(COLUMNS))
@pytest.mark.parametrize("within", [0, -1])
def test_flipped_bit_is_named(own_cache: Path, column: str, within: int) -> None:
    path = shard_file(own_cache, column, COLUMNS[column], 1)
    flip(path, chunk_position(11, column) + within % (COLUMNS[column].row_bytes + 4))
    reader = CacheReader(own_cache, list(COLUMNS))
    rows = np.array([12, 0, 11, 10], dtype=np.int64)
    with pytest.raises(CorruptRowError) as caught:
        reader.read_rows(rows, list(COLUMNS), buffers(4))
    assert (caught.value.row, caught.value.column, caught.value.path) == (11, column, str(path))
    assert str(path) in str(caught.value)
    assert f"row 11 of {column}" in str(caught.value)
    # the neighbours are whole
    rows = np.array([12, 0, 10], dtype=np.int64)
    out = buffers(3)
    reader.read_rows(rows, list(COLUMNS), out)
    check(out, rows)
    if within == 0:
        out = buffers(1)
        careless = CacheReader(own_cache, list(COLUMNS), check_crc=False)
        careless.read_rows(np.array([11]), list(COLUMNS), out)
        assert not np.array_equal(out[column][0], expected_row(column, 11, COLUMNS[column]))


def test_every_flipped_bit_of_a_shard_is_found(own_cache: Path) -> None:
    path = shard_file(own_cache, CLS, COLUMNS[CLS], 0)
    whole = path.read_bytes()
    rows = np.arange(8, dtype=np.int64)
    chunk = COLUMNS[CLS].row_bytes + 4
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(CacheError) as caught, CacheReader(own_cache, [CLS]) as reader:
            reader.read_rows(rows, [CLS], buffers(8, [CLS]))
        if len(whole) - position <= 4 or 0 <= 8 * chunk - 1 - position < 4:
            # the checksums of the last chunk and of the index are compared when the cache is opened
            assert caught.value.field == CLS
            continue
        assert isinstance(caught.value, CorruptRowError)
        # past the chunks lies the index, and no row can be read without it
        assert caught.value.row == (position // chunk if position < 8 * chunk else 0)


@pytest.mark.parametrize("size", [0, 3, 100, 500])
def test_cut_file_is_named(own_cache: Path, size: int) -> None:
    path = shard_file(own_cache, PATCH, COLUMNS[PATCH], 2)
    reader = CacheReader(own_cache, [PATCH])
    os.truncate(path, size)
    with pytest.raises(CacheError, match="the first is shard 2"):
        CacheReader(own_cache, [PATCH])
    with pytest.raises(CorruptRowError, match=f"row 17 of {PATCH} is corrupt") as caught:
        reader.read_rows(np.array([17]), [PATCH], buffers(1, [PATCH]))
    assert caught.value.path == str(path)


def test_file_cut_after_its_index_was_read_is_named(own_cache: Path) -> None:
    path = shard_file(own_cache, PATCH, COLUMNS[PATCH], 0)
    reader = CacheReader(own_cache, [PATCH])
    reader.read_rows(np.array([0]), [PATCH], buffers(1, [PATCH]))
    os.truncate(path, chunk_position(3, PATCH) + 7)
    with pytest.raises(CorruptRowError, match=r"row 3 of demo/patch is corrupt .the file was cut off"):
        reader.read_rows(np.array([2, 3]), [PATCH], buffers(2, [PATCH]))


def test_missing_file_is_named(own_cache: Path) -> None:
    path = shard_file(own_cache, MOMENTS, COLUMNS[MOMENTS], 1)
    reader = CacheReader(own_cache, [MOMENTS])
    path.unlink()
    with pytest.raises(CacheError, match="the first is shard 1"):
        CacheReader(own_cache, [MOMENTS])
    with pytest.raises(CacheError, match=f"row 9 of {MOMENTS} cannot be read from {path}") as caught:
        reader.read_rows(np.array([1, 9]), [MOMENTS], buffers(2, [MOMENTS]))
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ((2**64 - 1, 2**64 - 1), "its chunk is missing"),
        ((0, 12), "its chunk has another size"),
        ((2**63 + 5, 132), "the file was cut off"),
        ((2**40, 132), "the file was cut off"),
    ],
)
def test_index_that_gives_a_row_no_place_is_named(
    own_cache: Path, pair: tuple[int, int], reason: str
) -> None:
    from repa.data.format.shard_index import encode_index, index_bytes
    from shard_files_read import read_index

    path = shard_file(own_cache, PATCH, COLUMNS[PATCH], 0)
    with path.open("rb") as file:
        index = read_index(file.fileno(), str(path), 8, 1)
    index[4, 0] = pair
    reader = CacheReader(own_cache, [PATCH])
    # since it was opened: what is there by then is compared with the record
    path.write_bytes(path.read_bytes()[: -index_bytes(8, 1)] + encode_index(index))
    out = buffers(1, [PATCH])
    reader.read_rows(np.array([3]), [PATCH], out)
    check(out, np.array([3]))
    with pytest.raises(CorruptRowError, match=reason) as caught:
        reader.read_rows(np.array([4]), [PATCH], out)
    assert caught.value.row == 4


def test_short_reads_are_continued(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv

    def short(descriptor: int, targets: list[memoryview], offset: int, flags: int = 0) -> int:
        # at most 7 bytes a call, into the first target that has room
        return whole(descriptor, [next(each for each in targets if len(each))[:7]], offset)

    monkeypatch.setattr(os, "preadv", short)
    rows = np.array([34, 4, 9], dtype=np.int64)
    out = buffers(3)
    CacheReader(cache, list(COLUMNS)).read_rows(rows, list(COLUMNS), out)
    check(out, rows)


@pytest.mark.parametrize("row", [5, 36])
def test_invalid_row_is_refused(cache: Path, row: int) -> None:
    reader = CacheReader(cache, [PATCH])
    with pytest.raises(CacheError, match=f"row {row} .* is invalid"):
        reader.read_rows(np.array([1, row]), [PATCH], buffers(2, [PATCH]))


@pytest.mark.parametrize("row", [-1, NUM_ROWS, 40])
def test_row_outside_the_cache_is_refused(cache: Path, row: int) -> None:
    reader = CacheReader(cache, [PATCH])
    with pytest.raises(CacheError, match=f"row {row} is not one of the {NUM_ROWS}"):
        reader.read_rows(np.array([row]), [PATCH], buffers(1, [PATCH]))


def test_arrays_that_do_not_fit_are_refused(cache: Path) -> None:
    reader = CacheReader(cache, [PATCH])
    rows = np.array([1, 2])
    for array in (
        np.empty((2, 4, 16), np.float32),
        np.empty((3, 4, 16), np.float16),
        np.empty((2, 16, 4), np.float16).transpose(0, 2, 1),
    ):
        with pytest.raises(ValueError, match="C-contiguous"):
            reader.read_rows(rows, [PATCH], {PATCH: array})
    out = buffers(2, [PATCH])
    with pytest.raises(ValueError, match="1 views do not fit 2 rows"):
        reader.read_rows(rows, [PATCH], out, views=np.array([0]))
    with pytest.raises(CacheError, match="a view outside the 2"):
        reader.read_rows(rows, [PATCH], out, views=np.array([0, 2]))
    with pytest.raises(CacheError, match="demo/cls was not asked for"):
        reader.read_rows(rows, [CLS], out)


def test_incomplete_or_missing_columns_are_refused_with_the_remedy(own_cache: Path) -> None:
    with pytest.raises(CacheError, match=r"no column dinov2-b/patch .*repa preprocess .*--encoder dinov2-b"):
        CacheReader(own_cache, [MOMENTS, "dinov2-b/patch"])
    commit_file(own_cache, "demo", 1).unlink()
    with pytest.raises(CacheError, match=r"1 of the 3 shards of demo .* run the same `repa preprocess`"):
        CacheReader(own_cache, [PATCH])
    # the other source is whole
    CacheReader(own_cache, [MOMENTS])
    with pytest.raises(CacheError):
        CacheReader(own_cache.parent / "nowhere", [MOMENTS])
