"""Manifests, records and documents that others changed, their checksums made right: one line or success."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hostile_json import hostile
from hypothesis import given, settings
from hypothesis import strategies as st
from repa.data.errors import CacheError, RepaError
from repa.data.format.canonical import canonical_json
from repa.data.format.columns import ColumnSpec
from repa.data.format.grammar import is_name
from repa.data.format.layout import (
    CHECKSUM_ATTRIBUTE,
    GROUP_COPY,
    GROUP_FILE,
    KEYS_FILE,
    LABEL_CHUNK,
    calibration_file,
    commit_file,
    shard_file,
)
from repa.data.format.manifest import ATTRIBUTE
from repa.data.format.opening import open_manifest, read_keys
from repa.data.format.survey import survey
from repa.data.reading.reader import CacheReader
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from repa.data.upkeep.info import cache_info
from repa.data.upkeep.verify import verify_cache

if TYPE_CHECKING:
    from pathlib import Path

ATTENTION = {
    "demo/q": ColumnSpec(shape=(2, 2, 4, 4), dtype="float16"),
    "demo/k": ColumnSpec(shape=(2, 2, 4, 4), dtype="float16"),
}


JUNK = [b"[" * 5000, b'{"repa":{}' * 500, b"\xff\xfe\x00", b"9" * 5000]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "cache"
    synthetic_cache(path, num_rows=11, columns={**SYNTHETIC_COLUMNS, **ATTENTION}, invalid={3: "broken"})
    return path


def use(path: Path) -> None:
    """Open a cache, read all of it and look it over: what a command may do that changes nothing."""
    with suppress(RepaError):
        manifest = open_manifest(path)
        with suppress(RepaError):
            read_keys(path, manifest)
        with suppress(RepaError):
            cache_info(path)
        for finding in verify_cache(path):
            str(finding)
        with CacheReader(path, list(manifest.columns), direct="off") as reader:
            out = {
                name: np.empty((len(reader.valid_rows), *spec.shape), spec.numpy_dtype)
                for name, spec in manifest.columns.items()
            }
            reader.read_rows(reader.valid_rows, list(manifest.columns), out)


def write_manifest(path: Path, group: Any, manifest: Any, name: str = GROUP_FILE) -> None:
    """Put a manifest into a group's document, with its right checksum."""
    group["attributes"][ATTRIBUTE] = manifest
    with suppress(ValueError):
        group["attributes"][CHECKSUM_ATTRIBUTE] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    (path / name).write_text(json.dumps(group))


@settings(max_examples=120)
@given(st.data())
def test_any_manifest(cache: Path, data: st.DataObject) -> None:
    group = json.loads((cache / GROUP_FILE).read_bytes())
    kept = (cache / GROUP_FILE).read_bytes()
    try:
        write_manifest(cache, group, data.draw(hostile(group["attributes"][ATTRIBUTE])))
        use(cache)
    finally:
        (cache / GROUP_FILE).write_bytes(kept)


@settings(max_examples=40)
@given(st.data())
def test_any_document(cache: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([GROUP_FILE, f"demo/patch/{GROUP_FILE}", f"label/{GROUP_FILE}"]))
    kept = (cache / name).read_bytes()
    try:
        (cache / name).write_text(json.dumps(data.draw(hostile(json.loads(kept)))))
        use(cache)
    finally:
        (cache / name).write_bytes(kept)


@settings(max_examples=100)
@given(st.data())
def test_any_commit_record(cache: Path, data: st.DataObject) -> None:
    file = commit_file(
        cache, data.draw(st.sampled_from(["demo", "demo+attention"])), data.draw(st.integers(0, 1))
    )
    kept = file.read_bytes()
    values = json.loads(kept)
    del values["sha256"]
    try:
        values = data.draw(hostile(values))
        with suppress(ValueError, TypeError):
            values["sha256"] = hashlib.sha256(canonical_json(values)).hexdigest()
        with suppress(ValueError):
            file.write_bytes(canonical_json(values) + b"\n")
        use(cache)
    finally:
        file.write_bytes(kept)


@settings(max_examples=60)
@given(
    st.sampled_from([KEYS_FILE, LABEL_CHUNK, GROUP_FILE, "commits/demo/0.json", "demo/patch/c/0/0/0/0"]),
    st.binary(max_size=64) | st.sampled_from(JUNK),
)
def test_any_bytes(cache: Path, name: str, content: bytes) -> None:
    kept = (cache / name).read_bytes()
    manifest = json.loads((cache / GROUP_FILE).read_bytes())
    group = (cache / GROUP_FILE).read_bytes()
    try:
        (cache / name).write_bytes(content)
        use(cache)
        if name == KEYS_FILE:  # with the right checksum, too
            values = manifest["attributes"][ATTRIBUTE]
            write_manifest(cache, manifest, {**values, "keys_sha256": hashlib.sha256(content).hexdigest()})
            use(cache)
    finally:
        (cache / name).write_bytes(kept)
        (cache / GROUP_FILE).write_bytes(group)


def test_rows_that_a_record_marks_invalid_are_of_its_shard(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "c")
    file = commit_file(tmp_path / "c", "demo", 1)
    values = json.loads(file.read_bytes())
    del values["sha256"]
    for row in ("99999", "3", "-1"):
        changed = {**values, "invalid": {row: "x"}}
        changed["sha256"] = hashlib.sha256(canonical_json(changed)).hexdigest()
        file.write_bytes(canonical_json(changed) + b"\n")
        found = survey(tmp_path / "c", open_manifest(tmp_path / "c"))
        assert found.absent["demo"] == [1]
        assert len(found.damaged) == 1


def test_a_source_without_columns_has_no_shards(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "c")
    group = json.loads((cache / GROUP_FILE).read_bytes())
    manifest = group["attributes"][ATTRIBUTE]
    columns = {name: spec for name, spec in manifest["columns"].items() if name.startswith("sd-vae")}
    for name in (GROUP_FILE, GROUP_COPY):
        write_manifest(tmp_path / "c", group, {**manifest, "columns": columns}, name)
    for file in (tmp_path / "c" / "commits" / "demo").glob("*.json"):
        values = {**json.loads(file.read_bytes()), "columns": {}}
        del values["sha256"]
        values["sha256"] = hashlib.sha256(canonical_json(values)).hexdigest()
        file.write_bytes(canonical_json(values) + b"\n")
    found = survey(tmp_path / "c", open_manifest(tmp_path / "c"))
    assert found.absent["demo"] == [0, 1]
    use(tmp_path / "c")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_rows", "24"), ("num_rows", None), ("num_rows", -1), ("num_rows", 2**31 - 1),
        ("num_rows", 2**70),
        ("shard_rows", 0), ("shard_rows", "8"), ("shard_rows", 2**40), ("sources", {}), ("resolution", 10**9),
        ("views", ["a", "a"]), ("views", []), ("columns", {"../x/cls": {"shape": [1], "dtype": "float16"}}),
    ],
)  # fmt: skip
def test_what_no_manifest_says_is_named(cache: Path, tmp_path: Path, field: str, value: Any) -> None:
    shutil.copytree(cache, tmp_path / "c")
    group = json.loads((cache / GROUP_FILE).read_bytes())
    write_manifest(tmp_path / "c", group, {**group["attributes"][ATTRIBUTE], field: value})
    with pytest.raises(CacheError) as caught:
        open_manifest(tmp_path / "c")
    assert caught.value.field == field
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["logit_scale", "tolerance"])
def test_numbers_of_notes_are_those_of_float64(cache: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(cache, tmp_path / "c")
    group = json.loads((cache / GROUP_FILE).read_bytes())
    manifest = group["attributes"][ATTRIBUTE]
    for value, fits in ((1, True), (0.5, True), (10**400, False), ("1", False), (True, False)):
        manifest["sources"]["demo+attention"]["notes"][name] = value
        write_manifest(tmp_path / "c", group, manifest)
        if fits:
            assert open_manifest(tmp_path / "c").sources["demo+attention"].notes[name] == value
            continue
        with pytest.raises(CacheError) as caught:
            open_manifest(tmp_path / "c")
        assert caught.value.field.startswith(f"sources.demo+attention.notes.{name}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("components", []),
        ("components", [[]]),
        ("components", [[[1]]]),
        ("components", [[[1, 2, 3]]]),
        ("components", [[[-1, 2]]]),
        ("components", [[["1", 2]]]),
        ("components", [[[True, 2]]]),
        ("components", [[[1.5, 2]]]),
        ("components", {"0": 1}),
        ("components", "many"),
        ("tokens", 0),
        ("tokens", -4),
        ("tokens", "4"),
        ("tokens", 10**30),
        ("bytes", -1),
        ("bytes", "1"),
    ],
)
def test_notes_of_factors_are_refused_by_their_name(
    cache: Path, tmp_path: Path, name: str, value: object
) -> None:
    shutil.copytree(cache, tmp_path / "c")
    group = json.loads((cache / GROUP_FILE).read_bytes())
    manifest = group["attributes"][ATTRIBUTE]
    noted = manifest["sources"]["demo+attention"]["notes"]
    noted |= {"tokens": 4, "components": [[[1, 2], [0, 1]]], "bytes": 100}
    write_manifest(tmp_path / "c", group, manifest)
    assert open_manifest(tmp_path / "c").sources["demo+attention"].notes["components"] == noted["components"]
    noted[name] = value
    write_manifest(tmp_path / "c", group, manifest)
    with pytest.raises(CacheError) as caught:
        open_manifest(tmp_path / "c")
    assert caught.value.field.startswith(f"sources.demo+attention.notes.{name}")
    use(tmp_path / "c")


names = st.text(st.sampled_from("aZ0._+-/\\ \x00\n~é"), max_size=8) | st.sampled_from(
    [
        "commits",
        "Label",
        "calibration",
        "zarr.json",
        "a" * 101,
        "a..b",
        ".a",
        "-a",
        "sd-vae",
        "demo+attention",
    ]
)


@given(names)
def test_no_path_is_made_of_a_name_outside_the_grammar(name: str) -> None:
    from pathlib import Path

    root = Path("/cache")
    for make in (
        lambda: commit_file(root, name, 0),
        lambda: calibration_file(root, name),
        lambda: shard_file(root, f"{name}/cls", SYNTHETIC_COLUMNS["demo/cls"], 0),
    ):
        try:
            path = make()
        except RepaError:
            continue
        assert is_name(name)
        assert name in path.parts or path.stem == name
        assert root in path.parents
        assert ".." not in path.parts


def test_names_that_are_in_use_are_of_the_grammar() -> None:
    assert all(map(is_name, ("sd-vae", "demo", "dinov2-b+attention", "dino2.1", "mae-l_x", "A" * 100)))
    assert not any(map(is_name, ("", ".", "..", "a/b", "../../ESC/model", "commits", "LABEL", "a\n", "é")))
