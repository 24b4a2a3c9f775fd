"""Compressed columns: what damage is found, and a writer that is killed."""

from __future__ import annotations

import random
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
from compressed_cache import COLUMNS, COMPRESSED, SHARD_ROWS, VIEWS, index_of, read_one, write
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from killed_writers import commits_of, finish_writers, kill_writers, start_writer
from repa.data.errors import CorruptRowError
from repa.data.format.columns import ColumnSpec
from repa.data.format.compression import ChunkCodec
from repa.data.format.layout import shard_file
from repa.data.format.shard_index import MISSING, encode_index, index_bytes
from repa.data.reading.reader import CacheReader
from repa.data.testing import expected_row, folder_contents
from repa.data.upkeep.verify import verify_cache

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("pcodec")


@pytest.fixture
def copy(compressed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(compressed, tmp_path / "copy")


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
        file.write_bytes(whole)
        reader = CacheReader(copy, [name])  # before the damage, some of which opening finds
        file.write_bytes(data)
        findings = verify_cache(copy, [name], threads=1)
        assert [(finding.path, finding.column, finding.shard, finding.row) for finding in findings] == [
            (file, name, 1, row)
        ]
        with reader, pytest.raises(CorruptRowError) as caught:
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
def test_a_chunk_with_the_right_checksum_and_the_wrong_content_is_corrupt(tmp_path: Path, name: str) -> None:
    copy = tmp_path / "old"
    write(copy, 1)  # later records have the checksum that is right
    spec = COLUMNS[name]
    file = shard_file(copy, name, spec, 1)
    whole = file.read_bytes()
    longer = ColumnSpec(shape=(17, 32), dtype=spec.dtype, compressor=spec.compressor)
    wrong = spec.row_bytes * 17 // 16
    told = f"{wrong} bytes of" if spec.compressor != "pcodec" else "more than"
    forged = {
        f"decodes to {told} {spec.row_bytes}": ChunkCodec(longer).encode(expected_row(name, 0, longer)),
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
    index, whole = index_of(file), file.read_bytes()
    data = whole[: -index_bytes(SHARD_ROWS, len(VIEWS))]
    index[1, 0, 1] = size
    with CacheReader(copy, [name]) as reader:
        file.write_bytes(data + encode_index(index))
        with pytest.raises(CorruptRowError, match="its chunk has another size"):
            read_one(reader, name, 5)
    (finding,) = verify_cache(copy, [name])
    assert finding.row == 5
    assert "an index that points outside its data" in finding.what
    index[1, 0] = MISSING
    file.write_bytes(whole)
    with CacheReader(copy, [name]) as reader:
        file.write_bytes(data + encode_index(index))
        with pytest.raises(CorruptRowError, match="its chunk is missing"):
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


@pytest.mark.parametrize("stated", [0, 255, 1 << 40, (1 << 64) - 1])
def test_a_chunk_that_states_an_absurd_size_takes_no_memory(stated: int) -> None:
    codec = ChunkCodec(COLUMNS["zstd-float16/patch"])
    out = memoryview(bytearray(COLUMNS["zstd-float16/patch"].row_bytes))
    frame = b"\x28\xb5\x2f\xfd\xe0" + stated.to_bytes(8, "little") + b"\x01\x00\x00"
    assert codec.decode(frame, out) is not None
    # two megabytes of nothing but a repeated byte, in blocks, from a frame that states no size
    blocks = b"".join((2 | (1 << 17 << 3)).to_bytes(3, "little") + b"A" for _ in range(16))
    assert codec.decode(b"\x28\xb5\x2f\xfd\x00\x88" + blocks + b"\x01\x00\x00", out) is not None


@given(data=st.data(), name=st.sampled_from(COMPRESSED))
def test_hostile_chunks_end_in_no_exception_and_write_nothing_past_the_row(
    data: st.DataObject, name: str
) -> None:
    spec = COLUMNS[name]
    codec = ChunkCodec(spec)
    chunk = bytearray(codec.encode(expected_row(name, 0, spec)))
    for _ in range(data.draw(st.integers(1, 4))):
        chunk[data.draw(st.integers(0, min(40, len(chunk) - 1)))] = data.draw(st.integers(0, 255))
    guarded = bytearray(spec.row_bytes + 64)
    codec.decode(bytes(chunk), memoryview(guarded)[: spec.row_bytes])
    assert not any(guarded[spec.row_bytes :])


WRITE = """
import sys
from pathlib import Path
from repa.data.format.columns import ColumnSpec
from repa.data.testing import synthetic_cache
columns = {
    "demo/patch": ColumnSpec(shape=(64, 64), dtype="float16", compressor="blosc"),
    "demo/cls": ColumnSpec(shape=(64,), dtype="float16"),
    "other/patch": ColumnSpec(shape=(64, 64), dtype="float32", compressor="zstd"),
}
synthetic_cache(Path(sys.argv[1]), num_rows=200, shard_rows=8, columns=columns, invalid={7: "cut off"})
"""


def test_kill_9_and_resume_give_the_same_bytes(tmp_path: Path) -> None:
    finish_writers([start_writer(WRITE, tmp_path / "whole")])
    path = tmp_path / "cache"
    for least in (1, 9, 30):
        assert kill_writers([start_writer(WRITE, path, most=least + 5)], path, least) == 1
        assert least <= commits_of(path) <= least + 5 < 50
        for finding in verify_cache(path):
            assert "is not committed" in finding.what or finding.path.name.endswith(".partial"), str(finding)
    finish_writers([start_writer(WRITE, path)])
    assert folder_contents(path) == folder_contents(tmp_path / "whole")
    assert verify_cache(path) == []
