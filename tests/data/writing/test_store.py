"""Creating, declaring and writing a cache; and what other Zarr readers make of it."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tensorstore
import zarr
from repa.data.errors import CacheError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.format.commits import read_commit
from repa.data.format.layout import LOCK_FILE, shard_file
from repa.data.format.manifest import Manifest
from repa.data.format.opening import labels_sha256, open_manifest, read_keys, read_labels
from repa.data.format.shard_index import MISSING
from repa.data.format.survey import committed_shards, invalid_reasons, invalid_rows
from repa.data.storage import local_folder
from repa.data.testing import (
    SYNTHETIC_COLUMNS,
    expected_labels,
    expected_row,
    folder_contents,
    synthetic_cache,
    synthetic_provenance,
)
from repa.data.upkeep.info import cache_info
from repa.data.writing.store import (
    create_cache,
    ensure_cache,
    ensure_source,
    keys_sha256,
    refuse_foreign_folder,
)
from repa.data.writing.writer import SourceWriter
from shard_files_read import read_index

if TYPE_CHECKING:
    from collections.abc import Iterator

TEACHER = {"other/patch": ColumnSpec(shape=(6, 5), dtype="float32")}


def empty_manifest(keys: list[str], **fields: object) -> Manifest:
    values = {
        "num_rows": len(keys),
        "shard_rows": 4,
        "resolution": 64,
        "crop": "adm-center",
        "exif_orientation": "ignored",
        "source_kind": "folder",
        "source_fingerprint": "sha256:00",
        "keys_sha256": keys_sha256(keys),
        "class_names": ("a", "b"),
    }
    return Manifest(**{**values, **fields})


def refused(error: BaseException) -> str:
    """The message of an error for users, which must be one line."""
    message = str(error)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("views", [("original",), ("original", "mirrored")])
def test_other_readers_see_the_same_numbers(tmp_path: Path, views: tuple[str, ...]) -> None:
    invalid = {0: "not an image", 13: "cut off", 18: "empty"}
    columns = {**SYNTHETIC_COLUMNS, **TEACHER}
    manifest = synthetic_cache(tmp_path, num_rows=19, columns=columns, seed=5, invalid=invalid, views=views)
    group = zarr.open_group(str(tmp_path), mode="r")
    with warnings.catch_warnings():
        # zarr-python says of every file that is no array's, as our keys.txt, that it skips it
        warnings.simplefilter("ignore", UserWarning)
        assert sorted(group.group_keys()) == ["demo", "other", "sd-vae"]
    for name, spec in columns.items():
        by_zarr = group[name]
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / name)}}
        by_tensorstore = tensorstore.open(store).result()
        assert by_zarr.shape == by_tensorstore.shape == (19, len(views), *spec.shape)
        assert by_zarr.dtype == by_tensorstore.dtype.numpy_dtype == np.dtype(spec.dtype)
        first, second = by_zarr[:], by_tensorstore.read().result()
        assert first.tobytes() == second.tobytes()
        for row in range(19):
            for view in range(len(views)):
                expected = expected_row(name, row, spec, 5, view=view)
                if row in invalid:
                    expected = np.zeros_like(expected)
                assert first[row, view].tobytes() == expected.tobytes()
    assert group["label"][:].tolist() == expected_labels(19, 3, 5).tolist()
    assert manifest == open_manifest(tmp_path)


def test_array_metadata_are_the_public_sharding_layout(tmp_path: Path) -> None:
    synthetic_cache(tmp_path, num_rows=3)
    document = json.loads((tmp_path / "demo" / "patch" / "zarr.json").read_bytes())
    little, checksum = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    assert document["zarr_format"] == 3
    assert document["shape"] == [3, 1, 4, 16]
    assert document["data_type"] == "float16"
    assert document["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": [8, 1, 4, 16]}}
    assert document["codecs"] == [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [1, 1, 4, 16],
                "codecs": [little, checksum],
                "index_codecs": [little, checksum],
                "index_location": "end",
            },
        }
    ]
    label = json.loads((tmp_path / "label" / "zarr.json").read_bytes())
    assert label["shape"] == [3]
    assert label["data_type"] == "int32"
    assert label["codecs"] == [little, checksum]


def test_shard_file_holds_rows_one_after_the_other(tmp_path: Path) -> None:
    manifest = synthetic_cache(tmp_path, num_rows=5, shard_rows=4, invalid={1: "bad"})
    spec = manifest.columns["demo/cls"]
    file = shard_file(tmp_path, "demo/cls", spec, 0)
    assert file == tmp_path / "demo/cls/c/0/0/0"
    data = file.read_bytes()
    with file.open("rb") as opened:
        index = read_index(opened.fileno(), str(file), 4, 1)
    size = spec.row_bytes + 4
    assert index[:, 0].tolist() == [[0, size], [int(MISSING)] * 2, [size, size], [2 * size, size]]
    for position, row in enumerate((0, 2, 3)):
        stored = data[position * size : position * size + spec.row_bytes]
        assert stored == expected_row("demo/cls", row, spec).tobytes()
    assert len(data) == 3 * size + 4 * 16 + 4


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_the_disk_is_set_to_work_while_a_shard_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic_cache(tmp_path / "whole", num_rows=20, shard_rows=20)
    flushed: list[tuple[int, int]] = []

    def fadvise(descriptor: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        assert os.fstat(descriptor).st_size == start + length
        flushed.append((start, length))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    monkeypatch.setattr(local_folder, "_FLUSH_BYTES", 1500)
    columns = {MOMENTS: SYNTHETIC_COLUMNS[MOMENTS]}
    synthetic_cache(tmp_path / "flushed", num_rows=20, shard_rows=20, columns=columns)
    # 512 + 4 bytes a row: every third row
    assert flushed == [(each, 1548) for each in range(0, 6 * 1548, 1548)]
    synthetic_cache(tmp_path / "flushed", num_rows=20, shard_rows=20)
    assert folder_contents(tmp_path / "flushed") == folder_contents(tmp_path / "whole")


def test_rows_of_zeros_are_stored_and_kept_apart_from_missing_ones(tmp_path: Path) -> None:
    spec = ColumnSpec(shape=(3,), dtype="float16")
    manifest = synthetic_cache(tmp_path, num_rows=2, columns={})
    provenance = synthetic_provenance("zero", {"zero/cls": spec})
    manifest = ensure_source(tmp_path, "zero", provenance, {"zero/cls": spec})
    with SourceWriter(tmp_path, manifest, "zero", [0]) as writer, writer.shard(0) as shard:
        shard.write(0, "zero/cls", np.zeros((1, 3), dtype=np.float16))
        shard.mark_invalid(1, "bad")
        shard.commit()
    file = shard_file(tmp_path, "zero/cls", spec, 0)
    with file.open("rb") as opened:
        index = read_index(opened.fileno(), str(file), 8, 1)
    assert (index[:, 0, 0] != MISSING).tolist() == [True] + 7 * [False]
    assert invalid_rows(tmp_path, manifest).tolist() == [1]


def test_commit_record_depends_on_the_shard_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        manifest = synthetic_cache(tmp_path / name, num_rows=10, shard_rows=4, invalid={9: "bad"})
    assert folder_contents(tmp_path / "a") == folder_contents(tmp_path / "b")
    record = read_commit(tmp_path / "a", "demo", 2)
    assert record is not None
    assert (record.shard, record.rows, record.invalid) == (2, (8, 10), {9: "bad"})
    patch = shard_file(tmp_path / "a", "demo/patch", manifest.columns["demo/patch"], 2)
    assert record.columns["demo/patch"].file_bytes == patch.stat().st_size
    assert read_commit(tmp_path / "a", "demo", 3) is None
    assert committed_shards(tmp_path / "a", manifest, "demo") == [0, 1, 2]


def test_a_column_added_later_rewrites_nothing(tmp_path: Path) -> None:
    synthetic_cache(tmp_path, num_rows=10)
    groups = {tmp_path / "zarr.json", tmp_path / "zarr.json.copy"}
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path not in groups]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in files}
    old = json.loads((tmp_path / "zarr.json").read_bytes())["attributes"]["repa"]
    synthetic_cache(tmp_path, num_rows=10, columns=TEACHER)
    assert before == {
        path: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in files
    }
    new = json.loads((tmp_path / "zarr.json").read_bytes())["attributes"]["repa"]
    assert {**new, "columns": old["columns"], "sources": old["sources"]} == old
    assert new["columns"].keys() == old["columns"].keys() | TEACHER.keys()


def test_attributes_of_others_are_kept(tmp_path: Path) -> None:
    synthetic_cache(tmp_path, num_rows=2)
    group = zarr.open_group(str(tmp_path), mode="r+")
    group.attrs["note"] = "mine"
    synthetic_cache(tmp_path, num_rows=2, columns=TEACHER)
    assert zarr.open_group(str(tmp_path), mode="r").attrs["note"] == "mine"


def test_keys_and_labels_come_back(tmp_path: Path) -> None:
    keys = ["a/1.png", "b/ü\r.png", "b/\u2028 .png", "b/日.png"]
    labels = np.array([0, 1, 1, 1], dtype=np.int32)
    manifest = empty_manifest(keys, labels_sha256=labels_sha256(labels))
    create_cache(tmp_path / "cache", manifest, keys, labels)
    assert read_keys(tmp_path / "cache", manifest) == keys
    assert read_labels(tmp_path / "cache", manifest).tolist() == [0, 1, 1, 1]
    assert read_labels(tmp_path / "cache", manifest).dtype == np.int32
    with pytest.raises(CacheError, match="a cache already"):
        create_cache(tmp_path / "cache", manifest, keys, labels)


@pytest.mark.parametrize("key", ["two\nlines", "not utf-8 \udcff"])
def test_a_key_that_is_no_line_of_text_is_refused(key: str) -> None:
    with pytest.raises(CacheError, match="rename the file") as caught:
        keys_sha256(["fine", key])
    refused(caught.value).encode()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("resolution", 256, "resolution is 64, not 256"),
        ("exif_orientation", "applied", "exif_orientation is ignored, not applied"),
        ("source_fingerprint", "sha256:11", "source_fingerprint is sha256:00, not sha256:11"),
        ("shard_rows", 8, "shard_rows is 4, not 8"),
        ("views", ("original", "mirrored"), "views"),
        ("class_names", tuple(f"class {index}" for index in range(1000)), "class_names differs"),
    ],
)
def test_another_cache_is_refused_with_what_differs(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    keys, labels = ["a", "b"], np.zeros(2, dtype=np.int32)
    manifest = empty_manifest(keys, labels_sha256=labels_sha256(labels))
    ensure_cache(tmp_path / "cache", manifest, keys, labels)
    before = folder_contents(tmp_path)
    assert ensure_cache(tmp_path / "cache", manifest, keys, labels) == manifest
    with pytest.raises(CacheError, match="something else") as caught:
        ensure_cache(tmp_path / "cache", replace(manifest, **{field: value}), keys, labels)
    assert message in refused(caught.value)
    assert len(str(caught.value)) < 400
    other = labels + np.int32(1)
    with pytest.raises(CacheError, match="labels_sha256 differs"):
        ensure_cache(tmp_path / "cache", replace(manifest, labels_sha256=labels_sha256(other)), keys, other)
    assert folder_contents(tmp_path) == before


def test_another_model_under_the_same_name_is_refused(tmp_path: Path) -> None:
    manifest = synthetic_cache(tmp_path, num_rows=2)
    columns = manifest.source_columns("demo")
    provenance = manifest.sources["demo"]
    newer = replace(provenance, libraries={"timm": "9.9"})
    assert ensure_source(tmp_path, "demo", newer, columns) == manifest
    for other in (
        replace(provenance, weights_sha256="0" * 64),
        replace(provenance, random_weights=True),
        replace(provenance, grid=(1, 4)),
        replace(provenance, notes={"layer": 11}),
    ):
        with pytest.raises(CacheError, match="demo from another model or in another form") as caught:
            ensure_source(tmp_path, "demo", other, columns)
        assert "--encoder" in refused(caught.value)
    wider = {**columns, "demo/cls": ColumnSpec(shape=(17,), dtype="float16")}
    with pytest.raises(CacheError, match=r"float16\[16\]"):
        ensure_source(tmp_path, "demo", provenance, wider)
    with pytest.raises(CacheError, match="columns"):
        ensure_source(tmp_path, "demo", provenance, {"demo/cls": columns["demo/cls"]})


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    keys, labels = ["a"], np.zeros(1, dtype=np.int32)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_bytes(b"1")
    with pytest.raises(CacheError, match="not empty and no cache") as caught:
        ensure_cache(tmp_path / "photos", empty_manifest(keys), keys, labels)
    refused(caught.value)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["one.png"]
    with pytest.raises(CacheError, match="no cache at"):
        open_manifest(tmp_path / "photos")
    with pytest.raises(CacheError, match="no cache at"):
        open_manifest(tmp_path / "absent")
    (tmp_path / "lost" / "commits").mkdir(parents=True)
    with pytest.raises(CacheError, match=r"lost/zarr\.json is missing, which says what is in cache"):
        open_manifest(tmp_path / "lost")
    zarr.create_group(str(tmp_path / "zarr"))
    before = folder_contents(tmp_path / "zarr")
    with pytest.raises(CacheError, match="a Zarr group but no cache"):
        ensure_cache(tmp_path / "zarr", empty_manifest(keys), keys, labels)
    assert folder_contents(tmp_path / "zarr") == before


def test_misuse_of_a_shard_writer_is_refused(tmp_path: Path) -> None:
    columns = {"demo/cls": ColumnSpec(shape=(2,), dtype="float16")}
    synthetic_cache(tmp_path, num_rows=6, shard_rows=4, columns={})
    provenance = synthetic_provenance("demo", columns)
    manifest = ensure_source(tmp_path, "demo", provenance, columns)
    row = np.ones((1, 2), dtype=np.float16)
    before = folder_contents(tmp_path)
    with SourceWriter(tmp_path, manifest, "demo", [1]) as writer:
        with pytest.raises(ValueError, match="not owned"):
            writer.shard(0)
        with writer.shard(1) as shard:
            assert shard.rows == range(4, 6)
            for bad, problem in [
                (row.astype(np.float32), "float32"),
                (row[0], r"\[2\]"),
                (np.ones((2, 2), dtype=np.float16), r"\[2, 2\]"),
            ]:
                with pytest.raises(ValueError, match=problem):
                    shard.write(4, "demo/cls", bad)
            with pytest.raises(ValueError, match="not of shard"):
                shard.write(3, "demo/cls", row)
            shard.mark_invalid(4, "bad")
            with pytest.raises(ValueError, match="invalid"):
                shard.write(4, "demo/cls", row)
            with pytest.raises(ValueError, match="row 5 of demo/cls is neither written nor invalid"):
                shard.commit()
            shard.write(5, "demo/cls", row)
            with pytest.raises(ValueError, match="ascending"):
                shard.write(5, "demo/cls", row)
            with pytest.raises(ValueError, match="written already"):
                shard.mark_invalid(5, "bad")
        assert writer.remaining == [1]
    assert {k: v for k, v in folder_contents(tmp_path).items() if v != "folder"} == {
        **{k: v for k, v in before.items() if v != "folder"},
        "commits/demo/.lock": folder_contents(tmp_path)["commits/demo/.lock"],
    }
    with pytest.raises(CacheError, match="no source other"):
        SourceWriter(tmp_path, manifest, "other", [0])
    with pytest.raises(ValueError, match="shards 2 to 2 of 2"):
        SourceWriter(tmp_path, manifest, "demo", [2])


def test_a_shard_with_a_damaged_record_or_missing_file_is_written_again(tmp_path: Path) -> None:
    manifest = synthetic_cache(tmp_path, num_rows=20)
    whole = folder_contents(tmp_path)
    record = tmp_path / "commits" / "demo" / "0.json"
    record.write_bytes(record.read_bytes().replace(b"[0,8]", b"[0,9]"))
    shard_file(tmp_path, "demo/patch", manifest.columns["demo/patch"], 1).unlink()
    cut = shard_file(tmp_path, MOMENTS, manifest.columns[MOMENTS], 2)
    cut.write_bytes(cut.read_bytes()[:-5])
    assert committed_shards(tmp_path, manifest, "demo") == [2]
    assert committed_shards(tmp_path, manifest, "sd-vae") == [0, 1]
    with pytest.raises(CacheError, match=r"0\.json is damaged") as caught:
        invalid_reasons(tmp_path, manifest)
    refused(caught.value)
    synthetic_cache(tmp_path, num_rows=20)
    assert folder_contents(tmp_path) == whole


def test_info_counts_rows_shards_and_bytes(tmp_path: Path) -> None:
    manifest = synthetic_cache(tmp_path, num_rows=20, invalid={3: "bad"}, random_weights=True)
    (tmp_path / "commits" / "demo" / "1.json").unlink()
    info = cache_info(tmp_path)
    assert (info.num_rows, info.valid_rows, info.invalid) == (20, 19, {3: "bad"})
    assert (info.num_classes, info.resolution, info.num_shards) == (3, 32, 3)
    assert info.manifest == manifest
    assert not info.complete
    assert info.total_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    vae, demo = info.sources
    assert (vae.name, vae.shards_committed, demo.shards_committed) == ("sd-vae", 3, 2)
    assert (demo.model, demo.random_weights) == ("synthetic/demo", True)
    patch = demo.columns[0]
    assert (patch.name, patch.dtype, patch.shape) == ("demo/patch", "float16", (4, 16))
    assert patch.bytes_per_image == 4 * 16 * 2
    files = [shard_file(tmp_path, patch.name, manifest.columns[patch.name], shard) for shard in (0, 2)]
    assert patch.file_bytes == sum(file.stat().st_size for file in files)


def test_a_folder_that_another_process_begins_at_this_moment_is_no_foreign_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's lock and first file come while its files are listed."""
    folder = tmp_path / "cache"
    (folder / "calibration").mkdir(parents=True)
    listed = Path.iterdir

    def begun(path: Path) -> Iterator[Path]:
        (folder / LOCK_FILE).touch()
        (folder / "keys.txt").touch()
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", begun)
    refuse_foreign_folder(folder)
    monkeypatch.undo()
    (folder / LOCK_FILE).unlink()
    with pytest.raises(CacheError, match="no cache"):
        refuse_foreign_folder(folder)
