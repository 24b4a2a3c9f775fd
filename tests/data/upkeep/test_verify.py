"""Every flipped bit is found, and named by row where it lies in a row."""

from __future__ import annotations

import os
import random
import shutil
from typing import TYPE_CHECKING

import pytest
from repa.data.errors import CacheError
from repa.data.format.columns import MOMENTS
from repa.data.format.commits import read_commit
from repa.data.format.layout import shard_file
from repa.data.format.shard_index import MISSING, index_bytes
from repa.data.testing import synthetic_cache
from repa.data.upkeep.shard_check import Finding
from repa.data.upkeep.verify import verify_cache
from shard_files_read import read_index

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from repa.data.format.manifest import Manifest

ROWS = 11
SHARD_ROWS = 4
VIEWS = ("original", "mirrored")
INVALID = {2: "cut off"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that every test of this module leaves as it was."""
    path = tmp_path_factory.mktemp("verify") / "cache"
    synthetic_cache(path, num_rows=ROWS, shard_rows=SHARD_ROWS, views=VIEWS, invalid=INVALID)
    assert verify_cache(path) == []
    return path


@pytest.fixture
def manifest(cache: Path) -> Manifest:
    return synthetic_cache(cache, num_rows=ROWS, shard_rows=SHARD_ROWS, views=VIEWS, invalid=INVALID)


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        byte = os.pread(opened.fileno(), 1, bit // 8)[0]
        os.pwrite(opened.fileno(), bytes([byte ^ (1 << bit % 8)]), bit // 8)


def found_after_flip(cache: Path, file: Path, bit: int, columns: list[str] | None = None) -> list[Finding]:
    flip(file, bit)
    try:
        return verify_cache(cache, columns, threads=1)
    finally:
        flip(file, bit)


def shard_regions(cache: Path, manifest: Manifest) -> Iterator[tuple[str, int, Path, range, int | None]]:
    """Every region of every shard file: (column, shard, file, bytes, row when it is a row's)."""
    for name, spec in manifest.columns.items():
        for shard in range(manifest.num_shards):
            file = shard_file(cache, name, spec, shard)
            with file.open("rb") as opened:
                index = read_index(opened.fileno(), str(file), SHARD_ROWS, len(VIEWS))
            for at in range(SHARD_ROWS):
                for view in range(len(VIEWS)):
                    start = index[at, view, 0]
                    if start == MISSING:
                        continue
                    row, data = shard * SHARD_ROWS + at, int(start)
                    yield name, shard, file, range(data, data + spec.row_bytes), row
                    yield name, shard, file, range(data + spec.row_bytes, data + spec.row_bytes + 4), row
            size = file.stat().st_size
            start_of_index = size - index_bytes(SHARD_ROWS, len(VIEWS))
            yield name, shard, file, range(start_of_index, size - 4), None
            yield name, shard, file, range(size - 4, size), None


def test_a_flipped_bit_in_any_region_of_a_shard_is_found(cache: Path, manifest: Manifest) -> None:
    bits = random.Random(0)
    regions = list(shard_regions(cache, manifest))
    assert len(regions) == 3 * (2 * 2 * (ROWS - 1) + 2 * 3)
    for name, shard, file, region, row in regions:
        bit = bits.randrange(8 * region.start, 8 * region.stop)
        findings = found_after_flip(cache, file, bit, [name])
        assert [(f.path, f.source, f.column, f.shard, f.row) for f in findings] == [
            (file, name.split("/")[0], name, shard, row)
        ]
        assert str(file) in str(findings[0])
        if row is not None:
            assert str(findings[0]).startswith(f"row {row} of {name}: ")
    assert verify_cache(cache) == []


def test_every_bit_of_one_index_and_its_checksum_is_covered(cache: Path, manifest: Manifest) -> None:
    name = "demo/cls"
    file = shard_file(cache, name, manifest.columns[name], 0)
    size = file.stat().st_size
    start = size - index_bytes(SHARD_ROWS, len(VIEWS))
    for bit in range(8 * start, 8 * size, 7):
        findings = found_after_flip(cache, file, bit, [name])
        assert [(f.path, f.row) for f in findings] == [(file, None)]


def test_a_flipped_bit_in_any_other_file_is_found(cache: Path) -> None:
    bits = random.Random(1)
    others = [
        file
        for file in sorted(cache.rglob("*"))
        if file.is_file()
        and file.stat().st_size
        and (file.suffix in {".json", ".txt", ".copy"} or {"label", "valid"}.intersection(file.parts))
    ]
    assert len(others) == 2 + 1 + 2 + 2 + 3 + 2 * 3 + 1 + 3
    for file in others:
        for _ in range(12):
            bit = bits.randrange(8 * file.stat().st_size)
            findings = found_after_flip(cache, file, bit)
            assert file in {finding.path for finding in findings}, f"bit {bit} of {file}"
            assert all("\n" not in str(finding) for finding in findings)
    assert verify_cache(cache) == []


def test_every_bit_of_a_commit_record_is_covered(cache: Path) -> None:
    file = cache / "commits" / "demo" / "0.json"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        flip(file, bit)
        with pytest.raises(CacheError, match="damaged"):
            read_commit(cache, "demo", 0)
        flip(file, bit)
    assert file.read_bytes() == whole


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cache, tmp_path / "copy")


def test_swapped_shards_with_equal_indexes_are_found(tmp_path: Path) -> None:
    manifest = synthetic_cache(tmp_path, num_rows=8, shard_rows=4)
    spec = manifest.columns["demo/patch"]
    first, second = (shard_file(tmp_path, "demo/patch", spec, shard) for shard in (0, 1))
    data = first.read_bytes(), second.read_bytes()
    size = index_bytes(4, 1)
    assert data[0][-size:] == data[1][-size:]
    assert data[0] != data[1]
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    findings = verify_cache(tmp_path)
    assert [(finding.path, finding.row) for finding in findings] == [(first, None), (second, None)]
    assert all("intact, but not the file that was committed" in finding.what for finding in findings)


def test_swapped_commit_records_are_found(copy: Path) -> None:
    folder = copy / "commits" / "demo"
    (folder / "0.json").rename(folder / "swap")
    (folder / "1.json").rename(folder / "0.json")
    (folder / "swap").rename(folder / "1.json")
    findings = verify_cache(copy)
    assert [(finding.path.name, finding.shard) for finding in findings] == [("0.json", 0), ("1.json", 1)]
    assert "the one of shard 1" in findings[0].what


def test_cut_grown_and_missing_files_are_found(copy: Path, manifest: Manifest) -> None:
    files = [shard_file(copy, MOMENTS, manifest.columns[MOMENTS], shard) for shard in range(3)]
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].write_bytes(files[1].read_bytes() + b"\0")
    files[2].unlink()
    (copy / "keys.txt").unlink()
    (copy / "demo" / "zarr.json").unlink()
    (copy / "label" / "c" / "0").write_bytes(b"")
    findings = verify_cache(copy)
    assert [(str(finding.path.relative_to(copy)), finding.shard) for finding in findings] == [
        ("demo/zarr.json", None),
        ("keys.txt", None),
        ("label/c/0", None),
        *[(str(file.relative_to(copy)), shard) for shard, file in enumerate(files)],
    ]
    assert "bytes of" in findings[3].what
    assert "is missing" in findings[5].what
    assert all("`repa cache repair`" in finding.remedy for finding in findings)


def test_stray_files_are_found_and_unfinished_shards_are_not_strays(copy: Path, manifest: Manifest) -> None:
    strays = [copy / ".zarr.json.partial", copy / "commits" / "demo" / "3.json", copy / "demo" / "notes"]
    for file in strays:
        file.write_bytes(b"x")
    done = shard_file(copy, "demo/cls", manifest.columns["demo/cls"], 0)
    strays.append(done.with_name(".0.partial"))
    strays[-1].write_bytes(b"x")
    assert [finding.path for finding in verify_cache(copy)] == sorted(strays)
    assert verify_cache(copy, ["demo/cls"]) == []
    for file in strays:
        file.unlink()
    record = copy / "commits" / "demo" / "0.json"
    record.unlink()
    done.with_name(".0.partial").write_bytes(b"x")
    findings = verify_cache(copy)
    assert [(finding.path, finding.shard) for finding in findings] == [(record, 0)]
    assert "shard 0 of demo is not committed" in findings[0].what
    assert "repa preprocess" in findings[0].remedy


def test_progress_counts_all_bytes(cache: Path, manifest: Manifest) -> None:
    calls: list[tuple[int, int]] = []
    assert verify_cache(cache, progress=lambda done, total: calls.append((done, total)), threads=3) == []
    sizes = [
        shard_file(cache, name, spec, shard).stat().st_size
        for name, spec in manifest.columns.items()
        for shard in range(manifest.num_shards)
    ]
    assert calls[-1] == (sum(sizes), sum(sizes))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) == len(sizes)


def test_an_error_of_the_progress_callback_stops_the_check(cache: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_cache(cache, progress=stop)


def test_what_is_no_cache_or_lacks_the_column_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no cache at"):
        verify_cache(tmp_path / "absent")
    with pytest.raises(CacheError, match="has no column other/patch"):
        verify_cache(cache, ["other/patch"])
