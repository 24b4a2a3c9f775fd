"""Compressed columns: what other Zarr readers see, equal bytes of equal rows, what is refused and said."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorstore
import zarr
from compressed_cache import COLUMNS, COMPRESSED, INVALID, ROWS, index_of, write
from crc32c import crc32c
from repa.commands.measure.read_speed import measure_read_speed
from repa.data.errors import CacheError, RepaError
from repa.data.format import compression
from repa.data.format.columns import ColumnSpec
from repa.data.format.compression import ChunkCodec
from repa.data.format.layout import shard_file
from repa.data.format.manifest import Manifest
from repa.data.format.opening import open_manifest
from repa.data.reading.loader import CacheLoader
from repa.data.reading.reader import CacheReader
from repa.data.testing import expected_row, folder_contents, synthetic_cache, synthetic_provenance
from repa.data.upkeep.info import cache_info
from repa.data.writing.store import ensure_source

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("pcodec")


def zarr_array(path: Path, name: str) -> Any:
    with warnings.catch_warnings():
        # zarr-python tells whoever opens pcodec that it is not in the specification
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
        return zarr.open_array(str(path / name), mode="r")


@pytest.mark.parametrize("name", COMPRESSED)
def test_other_readers_see_the_same_numbers(compressed: Path, name: str) -> None:
    spec = COLUMNS[name]
    readings = [zarr_array(compressed, name)[:]]
    if spec.compressor != "pcodec":
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(compressed / name)}}
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
def test_the_stored_chunks_are_those_that_zarr_makes(compressed: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(compressed / name, tmp_path / "array")
    ours = shard_file(compressed, name, COLUMNS[name], 1)
    theirs = tmp_path / "array" / ours.relative_to(compressed / name)
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
def test_metadata_name_the_codecs_and_the_checksum_last(
    compressed: Path, name: str, codecs: list[Any]
) -> None:
    document = json.loads((compressed / name / "zarr.json").read_bytes())
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = document["codecs"][0]
    inner = [little if codec == "bytes" else codec for codec in codecs]
    assert sharding["configuration"]["codecs"] == [*inner, {"name": "crc32c"}]
    assert sharding["configuration"]["index_codecs"] == [little, {"name": "crc32c"}]


def test_int8_is_grouped_by_bits(compressed: Path) -> None:
    document = json.loads((compressed / "blosc-int8" / "patch" / "zarr.json").read_bytes())
    blosc = document["codecs"][0]["configuration"]["codecs"][1]["configuration"]
    assert (blosc["shuffle"], blosc["typesize"]) == ("bitshuffle", 1)


def test_equal_rows_give_equal_bytes_in_whatever_thread(compressed: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(write, tmp_path / "again").result()
    assert folder_contents(tmp_path / "again") == folder_contents(compressed)


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


def test_one_batch_mixes_compressed_and_direct_columns(compressed: Path) -> None:
    with CacheReader(compressed, list(COLUMNS)) as reader:
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


def test_a_reader_that_has_read_may_be_forked_and_pickled(compressed: Path) -> None:
    name = "blosc-float16/patch"
    expected = expected_row(name, 6, COLUMNS[name])
    with CacheReader(compressed, [name]) as reader:
        out = np.zeros((1, *COLUMNS[name].shape), COLUMNS[name].numpy_dtype)
        reader.read_rows(np.array([6]), [name], {name: out})
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
            child = context.Process(target=read_in_child, args=(reader, queue))
            child.start()
        assert queue.get(timeout=600) == expected.tobytes()
        child.join()
        with pickle.loads(pickle.dumps(reader)) as again:
            out[:] = 0
            again.read_rows(np.array([6]), [name], {name: out})
            assert np.array_equal(out[0], expected)


def test_without_the_package_of_pcodec_one_line_says_so(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        CacheReader(compressed, ["pcodec-float16/patch"])
    CacheReader(compressed, ["blosc-float16/patch"]).close()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RepaError, match="compressor 'gzip' is unknown; there are zstd, blosc, pcodec"):
        ColumnSpec(shape=(4,), dtype="float16", compressor="gzip")
    with pytest.raises(RepaError, match="pcodec compresses floats only"):
        ColumnSpec(shape=(4,), dtype="int8", compressor="pcodec")


def test_a_cache_holds_a_source_in_one_compression(compressed: Path) -> None:
    name = "zstd-float16/patch"
    columns = {name: ColumnSpec(shape=(16, 32), dtype="float16")}
    with pytest.raises(
        CacheError, match=rf"columns\.{name} is float16\[16, 32\] in zstd, not float16\[16, 32\];"
    ):
        ensure_source(compressed, "zstd-float16", synthetic_provenance("zstd-float16", columns), columns)


def test_a_manifest_from_before_compression_has_none(compressed: Path) -> None:
    values = open_manifest(compressed).to_json()
    assert values["columns"]["zstd-int8/patch"]["compressor"] == "zstd"
    for column in values["columns"].values():
        del column["compressor"]
    manifest = Manifest.from_json(values, where="here")
    assert {spec.compressor for spec in manifest.columns.values()} == {None}


def test_info_gives_the_ratio_of_data_to_file(compressed: Path) -> None:
    columns = {column.name: column for source in cache_info(compressed).sources for column in source.columns}
    for name, spec in COLUMNS.items():
        column = columns[name]
        files = [shard_file(compressed, name, spec, shard) for shard in range(3)]
        assert column.compressor == spec.compressor
        assert column.data_bytes == 2 * (ROWS - 1) * spec.row_bytes
        assert column.ratio == column.data_bytes / sum(file.stat().st_size for file in files)
    assert columns["plain/patch"].ratio < 1 < columns["zstd-float32/patch"].ratio


def test_read_speed_is_measured_and_leaves_nothing(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = folder_contents(compressed)
    speed = measure_read_speed(compressed, "zstd-float16/patch")
    assert speed is not None
    assert speed.rows == ROWS - 1
    assert speed.stored > 0
    assert speed.plain > 0
    assert os.listdir(tmp_path) == []
    assert folder_contents(compressed) == before


def test_no_read_speed_without_a_valid_row(tmp_path: Path) -> None:
    columns = {"demo/cls": ColumnSpec(shape=(4,), dtype="float16", compressor="zstd")}
    synthetic_cache(tmp_path, num_rows=2, columns=columns, invalid={0: "cut off", 1: "cut off"})
    assert measure_read_speed(tmp_path, "demo/cls") is None
