"""Intact files in the wrong place: a row knows whose it is, and is not taken for another."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zarr
from crc32c import crc32c
from repa.data.errors import CacheError, CorruptRowError
from repa.data.format.columns import ColumnSpec
from repa.data.format.commits import read_commit
from repa.data.format.layout import commit_file, shard_file, valid_chunk
from repa.data.format.opening import open_manifest
from repa.data.reading.reader import CacheReader
from repa.data.testing import SYNTHETIC_COLUMNS, folder_contents, synthetic_cache
from repa.data.upkeep.repair import plan_repair, restore_documents, withdraw
from repa.data.upkeep.verify import verify_cache

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QK = {name: ColumnSpec(shape=(1, 2, 4, 8), dtype="float16") for name in ("demo/q", "demo/k")}
COLUMNS = {**SYNTHETIC_COLUMNS, **QK}
PATCH = COLUMNS["demo/patch"]


def make(path: Path, **changes: object) -> Path:
    synthetic_cache(path, **{"num_rows": 24, "columns": COLUMNS, **changes})  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whose") / "cache")


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "cache")


def exchange(first: Path, second: Path) -> None:
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


def q_and_k(cache: Path, _: Path) -> str:
    exchange(*(shard_file(cache, name, spec, 1) for name, spec in QK.items()))
    return "demo/k"


def two_shards(cache: Path, _: Path) -> str:
    exchange(*(shard_file(cache, "demo/patch", PATCH, shard) for shard in (0, 1)))
    return "demo/patch"


def shards_and_records(cache: Path, _: Path) -> str:
    """The records too: each says which shard it is of."""
    exchange(*(shard_file(cache, "demo/patch", PATCH, shard) for shard in (0, 1)))
    exchange(*(commit_file(cache, "demo", shard) for shard in (0, 1)))
    return ""


def another_cache(cache: Path, other: Path) -> str:
    """The whole shard with its record, of a cache of other images."""
    make(other, seed=1)
    for name in ("demo/patch", "demo/cls"):
        shutil.copy(shard_file(other, name, COLUMNS[name], 2), shard_file(cache, name, COLUMNS[name], 2))
    shutil.copy(commit_file(other, "demo", 2), commit_file(cache, "demo", 2))
    return "demo"


def another_model(cache: Path, other: Path) -> str:
    """The whole shard with its record, of the same images and other weights."""
    make(other, random_weights=True)
    shutil.copy(commit_file(other, "demo", 2), commit_file(cache, "demo", 2))
    return "demo"


def labels_of_another_order(cache: Path, _: Path) -> str:
    file = cache / "label" / "c" / "0"
    values = np.frombuffer(file.read_bytes()[:-4], "<i4")[::-1].tobytes()
    file.write_bytes(values + crc32c(values).to_bytes(4, "little"))
    return "label"


@pytest.mark.parametrize(
    "misplace",
    [q_and_k, two_shards, shards_and_records, another_cache, another_model, labels_of_another_order],
)
def test_what_is_in_the_wrong_place_is_refused_when_the_cache_is_opened(
    misplace: Callable[[Path, Path], str], cache: Path, tmp_path: Path
) -> None:
    field = misplace(cache, tmp_path / "other")
    with pytest.raises(CacheError) as caught:
        CacheReader(cache, list(COLUMNS))
    assert caught.value.field == field
    assert caught.value.remedy
    assert verify_cache(cache)


def test_a_row_that_ends_alike_is_refused_when_it_is_read(cache: Path) -> None:
    """Two shards that end in the same row are told apart by the rows."""
    file = shard_file(cache, "demo/patch", PATCH, 1)
    chunk = PATCH.row_bytes + 4
    data = file.read_bytes()
    file.write_bytes(data[chunk : 2 * chunk] + data[:chunk] + data[2 * chunk :])
    rows, out = np.array([8]), np.empty((1, *PATCH.shape), dtype=PATCH.dtype)
    with CacheReader(cache, ["demo/patch"]) as reader:
        reader.read_rows(np.array([10]), ["demo/patch"], {"demo/patch": out})
        with pytest.raises(CorruptRowError) as caught:
            reader.read_rows(rows, ["demo/patch"], {"demo/patch": out})
        assert (caught.value.row, caught.value.column) == (8, "demo/patch")


def test_caches_of_version_1_are_read_as_they_are(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", format_version=1)
    assert verify_cache(cache) == []
    with CacheReader(cache, list(COLUMNS)) as reader:
        assert len(reader.valid_rows) == 24
    assert open_manifest(cache).outdated
    record = read_commit(cache, "demo", 0)
    assert record is not None
    assert (record.format_version, record.cache, record.columns["demo/cls"].chunks_crc32c) == (1, "", b"")


def test_zarr_readers_see_which_rows_have_data(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", num_rows=20, invalid={3: "cut off", 19: "empty"})
    expected = np.ones(20, dtype=bool)
    expected[[3, 19]] = False

    def valid() -> np.ndarray:
        return np.asarray(zarr.open_array(str(cache / "valid"), mode="r")[:])

    assert valid().dtype == bool
    assert np.array_equal(valid(), expected)
    # a source that is taken back says no more of its rows; a shard that nobody has written has no data
    manifest = open_manifest(cache)
    withdraw(cache, manifest, {source: [1] for source in manifest.sources})
    assert np.array_equal(valid(), expected & ~((np.arange(20) >= 8) & (np.arange(20) < 16)))


@pytest.mark.parametrize("damage", ["missing", "flipped", "older", "longer"])
def test_the_array_of_valid_rows_is_checked_and_mended(damage: str, tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", num_rows=20, invalid={3: "cut off"})
    before = folder_contents(cache)
    file = valid_chunk(cache, 0)
    if damage == "missing":
        file.unlink()
    elif damage == "older":
        shutil.copy(valid_chunk(cache, 1), file)
    elif damage == "longer":
        file.write_bytes(file.read_bytes() * 9)
    else:
        data = bytearray(file.read_bytes())
        data[1] ^= 1
        file.write_bytes(data)
    (finding,) = findings = verify_cache(cache)
    assert (finding.path, finding.column) == (file, "valid")
    restore_documents(cache, plan_repair(cache, findings))
    assert folder_contents(cache) == before
