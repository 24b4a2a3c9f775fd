"""Compressed columns: what other Zarr readers see, what damage is found, equal bytes of equal rows."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorstore
import zarr
from crc32c import crc32c
from repa.data import compression
from repa.data.columns import MOMENTS, ColumnSpec
from repa.data.compression import ChunkCodec
from repa.data.errors import CacheError, CorruptRowError, RepaError
from repa.data.info import cache_info
from repa.data.loader import CacheLoader
from repa.data.read_speed import measure_read_speed
from repa.data.reader import CacheReader
from repa.data.schema import Manifest
from repa.data.shard_index import MISSING, encode_index, index_bytes, read_index
from repa.data.store import ensure_source, open_manifest, shard_file
from repa.data.testing import expected_row, folder_contents, synthetic_cache, synthetic_provenance
from repa.data.verify import verify_cache

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = {
    MOMENTS: ColumnSpec(shape=(8, 4, 4), dtype="float32"),
    **{
        f"{codec}-{dtype}/patch": ColumnSpec(shape=(16, 32), dtype=dtype, compressor=codec)
        for codec in ("zstd", "blosc", "pcodec")
        for dtype in ("float16", "float32", "int8")
        if (codec, dtype) != ("pcodec", "int8")
    },
    "plain/patch": ColumnSpec(shape=(16, 32), dtype="float16"),
}
COMPRESSED = [name for name, spec in COLUMNS.items() if spec.compressor]
ROWS = 11
SHARD_ROWS = 4
VIEWS = ("original", "mirrored")
INVALID = {2: "cut off"}

pytest.importorskip("pcodec")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that every test of this module leaves as it was."""
    path = tmp_path_factory.mktemp("compression") / "cache"
    write(path)
    return path


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cache, tmp_path / "copy")


def write(path: Path) -> Manifest:
    return synthetic_cache(
        path, num_rows=ROWS, columns=COLUMNS, shard_rows=SHARD_ROWS, views=VIEWS, invalid=INVALID
    )


def zarr_array(path: Path, name: str) -> Any:
    with warnings.catch_warnings():
        # zarr-python tells whoever opens pcodec that it is not in the specification
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
        return zarr.open_array(str(path / name), mode="r")


def index_of(file: Path) -> np.ndarray[Any, Any]:
    with file.open("rb") as opened:
        return read_index(opened.fileno(), str(file), SHARD_ROWS, len(VIEWS))


def read_one(reader: CacheReader, name: str, row: int) -> np.ndarray[Any, Any]:
    out = np.zeros((1, *COLUMNS[name].shape), COLUMNS[name].numpy_dtype)
    reader.read_rows(np.array([row]), [name], {name: out})
    return out[0]


@pytest.mark.parametrize("name", COMPRESSED)
def test_other_readers_see_the_same_numbers(cache: Path, name: str) -> None:
    spec = COLUMNS[name]
    readings = [zarr_array(cache, name)[:]]
    if spec.compressor != "pcodec":
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache / name)}}
        readings.append(tensorstore.open(store).result().read().result())
    for values in readings:
        assert values.shape == (ROWS, 2, 16, 32)
        assert values.dtype == np.dtype(spec.dtype)
        for row in range(ROWS):
            for view in range(2):
                expected = expected_row(name, row, spec, view=view)
                expected = np.zeros_like(expected) if row in INVALID else expected
                assert values[row, view].tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_stored_chunks_are_those_that_zarr_makes(cache: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(cache / name, tmp_path / "array")
    ours = shard_file(cache, name, COLUMNS[name], 1)
    theirs = tmp_path / "array" / ours.relative_to(cache / name)
    theirs.unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
        array = zarr.open_array(str(tmp_path / "array"), mode="r+")
        array[4:8] = np.stack(
            [[expected_row(name, row, COLUMNS[name], view=view) for view in range(2)] for row in range(4, 8)]
        )
    data, other = ours.read_bytes(), theirs.read_bytes()
    for (offset, size), (place, length) in zip(
        index_of(ours).reshape(-1, 2).tolist(), index_of(theirs).reshape(-1, 2).tolist(), strict=True
    ):
        assert data[offset : offset + size] == other[place : place + length]
        assert crc32c(data[offset : offset + size - 4]) == int.from_bytes(
            data[offset + size - 4 : offset + size], "little"
        )


@pytest.mark.parametrize(
    ("name", "codecs"),
    [
        (
            "zstd-float16/patch",
            ["bytes", {"name": "zstd", "configuration": {"level": 3, "checksum": False}}],
        ),
        (
            "blosc-float32/patch",
            [
                "bytes",
                {
                    "name": "blosc",
                    "configuration": {
                        "cname": "zstd",
                        "clevel": 5,
                        "shuffle": "shuffle",
                        "typesize": 4,
                        "blocksize": 0,
                    },
                },
            ],
        ),
        ("pcodec-float16/patch", [{"name": "numcodecs.pcodec", "configuration": {"level": 8}}]),
    ],
)
def test_metadata_name_the_codecs_and_the_checksum_last(cache: Path, name: str, codecs: list[Any]) -> None:
    document = json.loads((cache / name / "zarr.json").read_bytes())
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = document["codecs"][0]
    inner = [little if codec == "bytes" else codec for codec in codecs]
    assert sharding["configuration"]["codecs"] == [*inner, {"name": "crc32c"}]
    assert sharding["configuration"]["index_codecs"] == [little, {"name": "crc32c"}]


def test_int8_is_grouped_by_bits(cache: Path) -> None:
    document = json.loads((cache / "blosc-int8" / "patch" / "zarr.json").read_bytes())
    blosc = document["codecs"][0]["configuration"]["codecs"][1]["configuration"]
    assert (blosc["shuffle"], blosc["typesize"]) == ("bitshuffle", 1)


def test_equal_rows_give_equal_bytes_in_whatever_thread(cache: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(write, tmp_path / "again").result()
    assert folder_contents(tmp_path / "again") == folder_contents(cache)


def test_rows_that_compress_well_and_badly_come_back(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for name in COMPRESSED:
        spec = COLUMNS[name]
        codec = ChunkCodec(spec)
        rows = [np.zeros(spec.shape, spec.numpy_dtype), np.ones(spec.shape, spec.numpy_dtype)]
        rows.append(np.frombuffer(noise.bytes(spec.row_bytes), spec.numpy_dtype).reshape(spec.shape))
        # not contiguous, as a transposed feature map would be
        rows.append(np.asfortranarray(rows[-1]))
        for row in rows:
            out = bytearray(spec.row_bytes)
            assert codec.decode(codec.encode(row), memoryview(out)) is None
            assert bytes(out) == row.tobytes()


def test_one_batch_mixes_compressed_and_direct_columns(cache: Path) -> None:
    with CacheReader(cache, list(COLUMNS)) as reader:
        rows = np.array([10, 0, 7, 7, 3, 9, 1])
        views = np.array([0, 1, 1, 0, 0, 1, 1])
        out = {name: np.zeros((7, *spec.shape), spec.numpy_dtype) for name, spec in COLUMNS.items()}
        with ThreadPoolExecutor(3) as pool:
            reader.read_rows(rows, list(COLUMNS), out, views=views, pool=pool, parts=3)
        for name, spec in COLUMNS.items():
            for place, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
                assert np.array_equal(out[name][place], expected_row(name, row, spec, view=view)), name
            assert reader.bytes_read[name] == 7 * spec.row_bytes
        loader = CacheLoader(
            reader, rows=reader.valid_rows, batch_size=5, last_image=10, columns_at=lambda step: list(COLUMNS)
        )
        seen = 0
        for batch in loader:
            for place, row in enumerate(batch.rows.tolist()):
                either = [
                    all(
                        np.array_equal(batch.columns[name][place], expected_row(name, row, spec, view=view))
                        for name, spec in COLUMNS.items()
                    )
                    for view in range(2)
                ]
                assert any(either)
                seen += 1
        loader.close()
        assert seen == 10


def read_in_child(reader: CacheReader, queue: Any) -> None:
    name = "blosc-float16/patch"
    out = np.zeros((1, *COLUMNS[name].shape), COLUMNS[name].numpy_dtype)
    reader.read_rows(np.array([6]), [name], {name: out})
    queue.put(out.tobytes())


def test_a_reader_that_has_read_may_be_forked_and_pickled(cache: Path) -> None:
    name = "blosc-float16/patch"
    expected = expected_row(name, 6, COLUMNS[name])
    with CacheReader(cache, [name]) as reader:
        out = np.zeros((1, *COLUMNS[name].shape), COLUMNS[name].numpy_dtype)
        reader.read_rows(np.array([6]), [name], {name: out})
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
            child = context.Process(target=read_in_child, args=(reader, queue))
            child.start()
        assert queue.get(timeout=30) == expected.tobytes()
        child.join(timeout=30)
        with pickle.loads(pickle.dumps(reader)) as again:
            out[:] = 0
            again.read_rows(np.array([6]), [name], {name: out})
            assert np.array_equal(out[0], expected)


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_flipped_bit_in_any_region_is_found_by_reader_and_verify(copy: Path, name: str) -> None:
    bits = random.Random(name)
    file = shard_file(copy, name, COLUMNS[name], 1)
    whole = file.read_bytes()
    regions: list[tuple[range, int | None]] = []
    for at, chunks in enumerate(index_of(file)):
        offset, size = chunks[0].tolist()
        regions += [
            (range(offset, offset + size - 4), 4 + at),
            (range(offset + size - 4, offset + size), 4 + at),
        ]
    end = len(whole) - index_bytes(SHARD_ROWS, len(VIEWS))
    regions += [(range(end, len(whole) - 4), None), (range(len(whole) - 4, len(whole)), None)]
    for region, row in regions:
        bit = bits.randrange(8 * region.start, 8 * region.stop)
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        findings = verify_cache(copy, [name], threads=1)
        assert [(finding.path, finding.column, finding.shard, finding.row) for finding in findings] == [
            (file, name, 1, row)
        ]
        with CacheReader(copy, [name]) as reader, pytest.raises(CorruptRowError) as caught:
            read_one(reader, name, 5 if row is None else row)
        assert (caught.value.column, caught.value.path) == (name, str(file))
        assert caught.value.row == (5 if row is None else row)
        assert "\n" not in str(caught.value)
    file.write_bytes(whole)
    assert verify_cache(copy, [name]) == []


def forge(file: Path, row: int, chunk: bytes) -> None:
    """Put a chunk with a checksum that fits at the end of the data, and an index that fits too."""
    index = index_of(file)
    data = file.read_bytes()[: -index_bytes(SHARD_ROWS, len(VIEWS))]
    stored = chunk + crc32c(chunk).to_bytes(4, "little")
    index[row % SHARD_ROWS, 0] = (len(data), len(stored))
    file.write_bytes(data + stored + encode_index(index))


@pytest.mark.parametrize("name", ["zstd-float16/patch", "blosc-int8/patch", "pcodec-float32/patch"])
def test_a_chunk_with_the_right_checksum_and_the_wrong_content_is_corrupt(copy: Path, name: str) -> None:
    spec = COLUMNS[name]
    file = shard_file(copy, name, spec, 1)
    whole = file.read_bytes()
    longer = ColumnSpec(shape=(17, 32), dtype=spec.dtype, compressor=spec.compressor)
    wrong = spec.row_bytes * 17 // 16
    forged = {
        f"decodes to {wrong} bytes of {spec.row_bytes}": ChunkCodec(longer).encode(
            expected_row(name, 0, longer)
        ),
        f"is not {spec.compressor}: ": b"no codec's",
    }
    for what, chunk in forged.items():
        with CacheReader(copy, [name]) as reader:
            # opening compares sizes; what happens to a file after that is met when reading
            forge(file, 5, chunk)
            with pytest.raises(CorruptRowError, match=f"row 5 of {name} is corrupt .*{what}"):
                read_one(reader, name, 5)
            assert np.array_equal(read_one(reader, name, 6), expected_row(name, 6, spec))
        assert len(verify_cache(copy, [name])) == 1
        file.write_bytes(whole)


@pytest.mark.parametrize("size", [0, 4, 2**40, 2**63, int(MISSING)])
def test_an_index_that_asks_for_absurd_sizes_is_corrupt(copy: Path, size: int) -> None:
    name = "zstd-float32/patch"
    file = shard_file(copy, name, COLUMNS[name], 1)
    index = index_of(file)
    data = file.read_bytes()[: -index_bytes(SHARD_ROWS, len(VIEWS))]
    index[1, 0, 1] = size
    file.write_bytes(data + encode_index(index))
    with (
        CacheReader(copy, [name]) as reader,
        pytest.raises(CorruptRowError, match="its chunk has another size"),
    ):
        read_one(reader, name, 5)
    (finding,) = verify_cache(copy, [name])
    assert finding.row == 5
    assert "an index that points outside its data" in finding.what
    index[1, 0] = MISSING
    file.write_bytes(data + encode_index(index))
    with CacheReader(copy, [name]) as reader, pytest.raises(CorruptRowError, match="its chunk is missing"):
        read_one(reader, name, 5)


def test_damage_without_checksums_is_an_error_or_other_numbers_but_no_crash(copy: Path) -> None:
    bits = random.Random(0)
    for name in COMPRESSED:
        file = shard_file(copy, name, COLUMNS[name], 0)
        whole = file.read_bytes()
        offset, size = index_of(file)[1, 0].tolist()
        for _ in range(20):
            data = bytearray(whole)
            bit = bits.randrange(8 * offset, 8 * (offset + size - 4))
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            with CacheReader(copy, [name], check_crc=False) as reader, suppress(CorruptRowError):
                assert read_one(reader, name, 1).shape == COLUMNS[name].shape


WRITE = """
import sys
from pathlib import Path
from repa.data.columns import ColumnSpec
from repa.data.testing import synthetic_cache
columns = {
    "demo/patch": ColumnSpec(shape=(64, 64), dtype="float16", compressor="blosc"),
    "demo/cls": ColumnSpec(shape=(64,), dtype="float16"),
    "other/patch": ColumnSpec(shape=(64, 64), dtype="float32", compressor="zstd"),
}
synthetic_cache(Path(sys.argv[1]), num_rows=200, shard_rows=8, columns=columns, invalid={7: "cut off"})
"""


def test_kill_9_and_resume_give_the_same_bytes(tmp_path: Path) -> None:
    def start(path: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", WRITE, str(path)])

    assert start(tmp_path / "whole").wait(timeout=60) == 0
    path = tmp_path / "cache"
    committed = 0
    for wanted in (1, 9, 30):
        process = start(path)
        while process.poll() is None and len(list(path.glob("commits/*/*.json"))) < wanted:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        before, committed = committed, len(list(path.glob("commits/*/*.json")))
        assert before < committed < 50
        for finding in verify_cache(path):
            assert "is not committed" in finding.what or finding.path.name.endswith(".partial"), str(finding)
    assert start(path).wait(timeout=60) == 0
    assert folder_contents(path) == folder_contents(tmp_path / "whole")
    assert verify_cache(path) == []


def test_without_the_package_of_pcodec_one_line_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "find_spec", lambda name: None)
    columns = {"demo/patch": ColumnSpec(shape=(4, 8), dtype="float16", compressor="pcodec")}
    synthetic_cache(tmp_path / "new", num_rows=4, columns={})
    before = folder_contents(tmp_path / "new")
    with pytest.raises(RepaError, match=r"needs the package pcodec.*pip install 'repa\[pcodec\]'") as caught:
        ensure_source(tmp_path / "new", "demo", synthetic_provenance("demo", columns), columns)
    assert "\n" not in str(caught.value)
    assert folder_contents(tmp_path / "new") == before
    with pytest.raises(RepaError, match="needs the package pcodec"):
        CacheReader(cache, ["pcodec-float16/patch"])
    CacheReader(cache, ["blosc-float16/patch"]).close()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RepaError, match="compressor 'gzip' is unknown; there are zstd, blosc, pcodec"):
        ColumnSpec(shape=(4,), dtype="float16", compressor="gzip")
    with pytest.raises(RepaError, match="pcodec compresses floats only"):
        ColumnSpec(shape=(4,), dtype="int8", compressor="pcodec")


def test_a_cache_holds_a_source_in_one_compression(cache: Path) -> None:
    name = "zstd-float16/patch"
    columns = {name: ColumnSpec(shape=(16, 32), dtype="float16")}
    with pytest.raises(
        CacheError, match=rf"columns\.{name} is float16\[16, 32\] in zstd, not float16\[16, 32\];"
    ):
        ensure_source(cache, "zstd-float16", synthetic_provenance("zstd-float16", columns), columns)


def test_a_manifest_from_before_compression_has_none(cache: Path) -> None:
    values = open_manifest(cache).to_json()
    assert values["columns"]["zstd-int8/patch"]["compressor"] == "zstd"
    for column in values["columns"].values():
        del column["compressor"]
    manifest = Manifest.from_json(values, where="here")
    assert {spec.compressor for spec in manifest.columns.values()} == {None}


def test_info_gives_the_ratio_of_data_to_file(cache: Path) -> None:
    columns = {column.name: column for source in cache_info(cache).sources for column in source.columns}
    for name, spec in COLUMNS.items():
        column = columns[name]
        files = [shard_file(cache, name, spec, shard) for shard in range(3)]
        assert column.compressor == spec.compressor
        assert column.data_bytes == 2 * (ROWS - 1) * spec.row_bytes
        assert column.ratio == column.data_bytes / sum(file.stat().st_size for file in files)
    assert columns["plain/patch"].ratio < 1 < columns["zstd-float32/patch"].ratio


def test_read_speed_is_measured_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = folder_contents(cache)
    speed = measure_read_speed(cache, "zstd-float16/patch")
    assert speed is not None
    assert speed.rows == ROWS - 1
    assert speed.stored > 0
    assert speed.plain > 0
    assert os.listdir(tmp_path) == []
    assert folder_contents(cache) == before


def test_no_read_speed_without_a_valid_row(tmp_path: Path) -> None:
    columns = {"demo/cls": ColumnSpec(shape=(4,), dtype="float16", compressor="zstd")}
    synthetic_cache(tmp_path, num_rows=2, columns=columns, invalid={0: "cut off", 1: "cut off"})
    assert measure_read_speed(tmp_path, "demo/cls") is None
