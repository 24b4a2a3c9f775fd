"""A cache as tars and back: the same bytes, whatever stops it in between, and no damage gets through."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.format.opening import open_manifest
from repa.data.reading.reader import CacheReader
from repa.data.tars import export
from repa.data.tars.export import export_cache, export_pattern, import_cache
from repa.data.tars.shards import npy_header, tar_key
from repa.data.testing import (
    SYNTHETIC_COLUMNS,
    expected_labels,
    expected_row,
    folder_contents,
    synthetic_cache,
)
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.calibrations import ensure_calibration
from repa.data.writing.store import ensure_source

ROWS = 21
INVALID = {5: "broken", 8: "empty file (0 bytes)", 16: "broken", 17: "x", 18: "x", 19: "x", 20: "x"}
EVERYTHING = {
    **SYNTHETIC_COLUMNS,
    "dino2.1/patch": ColumnSpec(shape=(4, 8), dtype="int8"),
    "dino2.1/patch-scale": ColumnSpec(shape=(8,), dtype="float32"),
    "dino2.1/q": ColumnSpec(shape=(2, 3, 4, 5), dtype="float16"),
    "dino2.1/k": ColumnSpec(shape=(2, 3, 4, 5), dtype="float16"),
    "packed/patch": ColumnSpec(shape=(4, 16), dtype="float16", compressor="zstd"),
}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    data = b"projections"
    note = {"images": 3, "sha256": hashlib.sha256(data).hexdigest()}
    ensure_calibration(tmp_path / "cache", "dino2.1+attention", lambda: data)
    synthetic_cache(
        tmp_path / "cache",
        num_rows=ROWS,
        columns=EVERYTHING,
        invalid=INVALID,
        views=("original", "mirrored"),
        notes={"dino2.1+attention": {"calibration": note}},
    )
    return tmp_path / "cache"


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def rewrite(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_there_and_back_is_the_same_tree(cache: Path, tmp_path: Path) -> None:
    done = export_cache(cache, tmp_path / "out")
    assert (done.shards, done.kept, done.images) == (3, 0, ROWS - len(INVALID))
    pattern = export_pattern(tmp_path / "out", 3)
    assert pattern.endswith("out/shard-{000000..000002}.tar")
    back = import_cache(pattern, tmp_path / "back")
    assert back == done
    assert folder_contents(tmp_path / "back") == folder_contents(cache)
    assert verify_cache(tmp_path / "back") == []


def test_tars_are_a_function_of_the_cache(cache: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_cache(cache, tmp_path / name)
    assert folder_contents(tmp_path / "a") == folder_contents(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar} == {
            (0, 0, 0, "repa", "repa")
        }


def test_webdataset_reads_them(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    manifest = synthetic_cache(tmp_path / "cache", num_rows=11, invalid={4: "broken"})
    export_cache(tmp_path / "cache", tmp_path / "out")
    samples = []
    for shard in range(2):
        with (tmp_path / "out" / f"shard-00000{shard}.tar").open("rb") as file:
            samples += list(group_by_keys({**each, "__url__": ""} for each in tar_file_iterator(file)))
    for sample in samples:
        sample["json"] = json.loads(sample["json"])
    assert [sample["json"]["row"] for sample in samples] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert samples[4]["__key__"] == "images/000005%2Epng"
    assert samples[4]["json"]["key"] == "images/000005.png"
    assert [int(sample["cls"]) for sample in samples] == [
        int(expected_labels(11, 3)[sample["json"]["row"]]) for sample in samples
    ]
    for name, spec in manifest.columns.items():
        for sample in samples:
            expected = expected_row(name, sample["json"]["row"], spec)
            found = np.load(io.BytesIO(sample[f"{name.replace('/', '.')}.npy"]), allow_pickle=False)
            assert np.array_equal(found, expected[None])
            assert found.dtype == spec.numpy_dtype


def test_some_columns_and_their_scales(cache: Path, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out", [MOMENTS, "dino2.1/patch"])
    import_cache(str(tmp_path / "out" / "*.tar"), tmp_path / "back")
    manifest = open_manifest(tmp_path / "back")
    assert set(manifest.columns) == {MOMENTS, "dino2.1/patch", "dino2.1/patch-scale"}
    assert verify_cache(tmp_path / "back") == []
    rows = np.array([20 - 5, 0, 9], dtype=np.int64)
    with CacheReader(tmp_path / "back", list(manifest.columns)) as reader:
        assert reader.invalid_rows.tolist() == list(INVALID)
        for name, spec in manifest.columns.items():
            out = {name: np.empty((3, *spec.shape), spec.numpy_dtype)}
            reader.read_rows(rows, (name,), out)
            assert all(
                np.array_equal(out[name][position], expected_row(name, int(row), spec))
                for position, row in enumerate(rows)
            )
    with pytest.raises(CacheError, match="has no column dinov2-b/patch"):
        export_cache(cache, tmp_path / "no", ["dinov2-b/patch"])


def test_a_row_that_one_source_lacks_comes_back_as_lacking(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=9, columns={MOMENTS: SYNTHETIC_COLUMNS[MOMENTS]})
    synthetic_cache(tmp_path / "cache", num_rows=9, columns=SYNTHETIC_COLUMNS, invalid={3: "later"})
    export_cache(tmp_path / "cache", tmp_path / "out", [MOMENTS])
    import_cache(str(tmp_path / "out" / "*.tar"), tmp_path / "back")
    with CacheReader(tmp_path / "back", [MOMENTS]) as reader:
        assert reader.invalid_rows.tolist() == [3]
    assert verify_cache(tmp_path / "back") == []


def test_both_go_on_where_they_were_stopped(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, back = tmp_path / "out", tmp_path / "back"

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_cache(cache, out, progress=stop)
    assert sorted(os.listdir(out)) == ["shard-000000.tar", "shard-000001.tar"]
    assert export_cache(cache, out).kept == 2
    with pytest.raises(KeyboardInterrupt):
        import_cache(str(out / "*.tar"), back, progress=stop)
    (back / "commits" / "demo" / "1.json").unlink()
    assert import_cache(str(out / "*.tar"), back).kept == 1
    assert folder_contents(back) == folder_contents(cache)
    assert import_cache(str(out / "*.tar"), back).kept == 3


def test_a_failed_write_leaves_no_tar(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.os, "fsync", full)
    with pytest.raises(RepaError, match=r"cannot write .*shard-000000\.tar: No space left on device; free"):
        export_cache(cache, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_without_webdataset(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.writer", None)
    with pytest.raises(RepaError, match=r"pip install 'repa\[tars\]'"):
        export_cache(cache, tmp_path / "out")


def test_another_export_is_not_overwritten(cache: Path, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out", [MOMENTS])
    with pytest.raises(CacheError, match=r"shard-000000\.tar is of another export"):
        export_cache(cache, tmp_path / "out")
    export_cache(cache, tmp_path / "all")
    with pytest.raises(CacheError, match="not of one export"):
        import_cache(f"{tmp_path}/{{all/shard-000000,out/shard-000001}}.tar", tmp_path / "back")
    with pytest.raises(RepaError, match="lacks 1 of the 3 tars of the export, the first is that of shard 1"):
        import_cache(f"{tmp_path}/all/shard-{{000002,000000}}.tar", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    import_cache(f"{tmp_path}/all/shard-{{000002..000000}}.tar", tmp_path / "back")
    synthetic_cache(tmp_path / "other", num_rows=ROWS, seed=1)
    with pytest.raises(CacheError, match="is a cache of something else"):
        import_cache(f"{tmp_path}/all/shard-{{000000..000002}}.tar", tmp_path / "other")


def test_nothing_gets_into_another_cache(cache: Path, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out")
    synthetic_cache(tmp_path / "other", num_rows=ROWS, seed=1)
    before = folder_contents(tmp_path / "other")
    with pytest.raises(CacheError, match="is a cache of something else"):
        import_cache(str(tmp_path / "out" / "*.tar"), tmp_path / "other")
    assert folder_contents(tmp_path / "other") == before


def test_a_calibration_that_nothing_relies_on_is_replaced(cache: Path, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out")
    ensure_calibration(tmp_path / "back", "dino2.1+attention", lambda: b"of a run that was given up")
    import_cache(str(tmp_path / "out" / "*.tar"), tmp_path / "back")
    assert folder_contents(tmp_path / "back") == folder_contents(cache)


@pytest.mark.parametrize("change", ["flip", "drop"])
def test_a_damaged_calibration_is_named(cache: Path, tmp_path: Path, change: str) -> None:
    export_cache(cache, tmp_path / "out")
    path = tmp_path / "out" / "shard-000000.tar"
    files = members(path)
    name = "__repa__/calibration/dino2.1+attention.safetensors"
    files[name] = files[name].upper()
    if change == "drop":
        del files[name]
    rewrite(path, files)
    with pytest.raises(
        CacheError, match=r"shard-000000\.tar lacks the calibration of dino2\.1\+attention, or it"
    ):
        import_cache(str(tmp_path / "out" / "*.tar"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("left", [0.3, 0.9])
def test_a_tar_that_was_cut_off_is_written_again(cache: Path, tmp_path: Path, left: float) -> None:
    export_cache(cache, tmp_path / "out")
    whole = folder_contents(tmp_path / "out")
    path = tmp_path / "out" / "shard-000001.tar"
    os.truncate(path, int(path.stat().st_size * left) // 512 * 512)
    assert export_cache(cache, tmp_path / "out").kept == 2
    assert folder_contents(tmp_path / "out") == whole
    path.write_bytes(b"notes")
    with pytest.raises(CacheError, match=r"shard-000001\.tar is of another export; choose another --out"):
        export_cache(cache, tmp_path / "out")


def test_through_a_pipe(cache: Path, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out")
    import_cache(f"pipe:cat {tmp_path}/out/shard-{{000000..000002}}.tar", tmp_path / "back")
    assert folder_contents(tmp_path / "back") == folder_contents(cache)


@pytest.mark.parametrize("field", ["cls", "json", "demo.patch.npy", "sd-vae.moments.npy"])
@pytest.mark.parametrize("change", ["flip", "short", "drop"])
def test_damage_is_named_and_nothing_of_it_committed(tmp_path: Path, field: str, change: str) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=11)
    export_cache(tmp_path / "cache", tmp_path / "out")
    path = tmp_path / "out" / "shard-000001.tar"
    files = members(path)
    name = f"images/000009%2Epng.{field}"
    data = bytearray(files[name])
    data[-1] ^= 1
    files[name] = bytes(data) if change == "flip" else files[name][:-1]
    if change == "drop":
        del files[name]
    rewrite(path, files)
    with pytest.raises(
        CacheError, match=r"row 9 in .*shard-000001\.tar, sample images/000009%2Epng"
    ) as caught:
        import_cache(str(tmp_path / "out" / "*.tar"), tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "back" / "commits").glob("*/1.json"))
    assert len(list((tmp_path / "back" / "commits").glob("*/0.json"))) == 2


def test_samples_that_are_missing_or_strange(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=5)
    export_cache(tmp_path / "cache", tmp_path / "out")
    path = tmp_path / "out" / "shard-000000.tar"
    whole = members(path)

    def refused(what: str, files: dict[str, bytes]) -> None:
        rewrite(path, files)
        with pytest.raises(RepaError, match=what) as caught:
            import_cache(str(path), tmp_path / "back")
        assert "\n" not in str(caught.value)

    refused("no sample of row 4", {name: data for name, data in whole.items() if "000004" not in name})
    refused(
        "where its header has another", {name: data for name, data in whole.items() if "000002" not in name}
    )
    refused("where its header has another", {**whole, "x.cls": b"1"})
    refused("no tar of a cache", {name: data for name, data in whole.items() if "__" not in name})
    header = json.loads(whole["__repa__/shard.json"])
    refused(
        "of export format 9", {**whole, "__repa__/shard.json": json.dumps({**header, "format": 9}).encode()}
    )
    refused("header of .*format is missing", {**whole, "__repa__/shard.json": b"{}"})
    rewrite(path, whole)
    import_cache(str(path), tmp_path / "back")
    assert folder_contents(tmp_path / "back") == folder_contents(tmp_path / "cache")


def test_keys_of_images_become_keys_of_samples() -> None:
    keys = ["a.jpg", "a%2Ejpg", "a.b.jpg", "d.d/x.png", "a", "__x__/a.jpg", "%5F_x__/a", "ü/ß.webp"]
    assert len({tar_key(key) for key in keys}) == len(keys)
    from repa.data.tars.reader import split_member

    for key in keys:
        assert split_member(f"{tar_key(key)}.cls") == (tar_key(key), "cls")


def test_npy_headers_are_numpys() -> None:
    for spec, views in (
        (ColumnSpec(shape=(4, 16), dtype="float16"), 1),
        (ColumnSpec(shape=(3,), dtype="int8"), 2),
    ):
        array = np.zeros((views, *spec.shape), spec.numpy_dtype)
        stream = io.BytesIO()
        np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
        assert stream.getvalue() == npy_header(spec, views) + array.tobytes()


def test_an_incomplete_cache_is_not_exported(tmp_path: Path) -> None:
    manifest = synthetic_cache(tmp_path / "cache", num_rows=5)
    provenance = replace(manifest.sources["demo"], model="other")
    ensure_source(
        tmp_path / "cache", "more", provenance, {"more/cls": ColumnSpec(shape=(3,), dtype="float16")}
    )
    with pytest.raises(CacheError, match="not wholly written"):
        export_cache(tmp_path / "cache", tmp_path / "out")
    assert export_cache(tmp_path / "cache", tmp_path / "out", ["demo/cls"]).images == 5
