"""Every damage to a zarr.json is found and named, and what follows from the manifest is written again."""

from __future__ import annotations

import io
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from repa.commands.cache.repair import repair
from repa.data.errors import CacheError
from repa.data.format.columns import ColumnSpec
from repa.data.format.opening import open_manifest, read_keys, read_labels
from repa.data.testing import SYNTHETIC_COLUMNS, folder_contents, synthetic_cache
from repa.data.upkeep.repair import plan_repair, restore_tables
from repa.data.upkeep.verify import verify_cache
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COLUMNS = {**SYNTHETIC_COLUMNS, "demo/cls": ColumnSpec(shape=(16,), dtype="float16", compressor="zstd")}
DOCUMENTS = (
    "zarr.json",
    "label/zarr.json",
    "valid/zarr.json",
    "sd-vae/zarr.json",
    "demo/zarr.json",
    "sd-vae/moments/zarr.json",
    "demo/patch/zarr.json",
    "demo/cls/zarr.json",
)
AGAIN = "have it written again by `repa cache repair`"
RESTORE = "restore it, or write the cache again in another folder"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("metadata") / "cache"
    synthetic_cache(path, num_rows=11, shard_rows=4, columns=COLUMNS, invalid={5: "cut off"})
    assert verify_cache(path) == []
    return path


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "cache")


def mend(cache: Path) -> str:
    output = io.StringIO()
    repair(cache=cache, console=Console(file=output, width=300))
    return output.getvalue()


def change(**values: Any) -> Callable[[Path], None]:
    def rewrite(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return rewrite


def missing(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def no_json(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"}")


def no_utf8(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")


def nested(file: Path) -> None:
    file.write_text("[" * 100_000)


def another_file(file: Path) -> None:
    file.write_text('{"hello": [1, 2]}')


DAMAGES: tuple[tuple[Callable[[Path], None], str], ...] = (
    (missing, "is missing"),
    (truncated, "is damaged"),
    (empty, "is damaged"),
    (no_json, "is damaged"),
    (no_utf8, "is damaged"),
    (nested, "is damaged"),
    (another_file, "does not describe what the manifest does"),
    (change(zarr_format=2), "does not describe what the manifest does"),
    (change(attributes=[]), "does not describe what the manifest does"),
)


@pytest.mark.parametrize("name", DOCUMENTS[1:])
def test_any_damage_is_named_and_mended_byte_for_byte(name: str, cache: Path, whole: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}
    file = cache / name
    for damage, what in DAMAGES:
        damage(file)
        assert [str(finding) for finding in verify_cache(cache)] == [f"{file} {what}; {AGAIN}"]
        assert mend(cache) == (f"{cache}: 1 file of metadata to write\n{cache}: all is as committed\n")
        assert folder_contents(cache) == folder_contents(whole)
    del before[file]
    assert {each: each.stat().st_mtime_ns for each in before} == before, "shards are not touched"


@pytest.mark.parametrize(
    "values",
    [
        {"shape": [12, 1, 16]},
        {"data_type": "float32"},
        {"fill_value": 1.0},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8, 1, 16]}}},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]},
        {"node_type": "group"},
        {"dimension_names": ["a", "b", "c"]},
    ],
)
def test_an_array_of_another_description(values: dict[str, Any], cache: Path, whole: Path) -> None:
    file = cache / "demo" / "cls" / "zarr.json"
    change(**values)(file)
    (finding,) = verify_cache(cache)
    assert str(finding) == f"{file} does not describe what the manifest does; {AGAIN}"
    assert (finding.column, finding.source) == ("demo/cls", "demo")
    mend(cache)
    assert folder_contents(cache) == folder_contents(whole)


def test_all_at_once_and_again(cache: Path, whole: Path) -> None:
    for name, (damage, _) in zip(DOCUMENTS[1:], DAMAGES, strict=False):
        damage(cache / name)
    change(zarr_format=2)(cache / "zarr.json")
    assert [str(each.path.relative_to(cache)) for each in verify_cache(cache)] == list(DOCUMENTS)
    assert mend(cache).startswith(f"{cache}: 8 files of metadata to write\n")
    assert folder_contents(cache) == folder_contents(whole)
    assert mend(cache) == f"{cache}: all is as committed: nothing to repair\n"
    assert folder_contents(cache) == folder_contents(whole)


def test_killed_between_two_documents_it_goes_on(
    cache: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from repa.data.storage import files

    for name in DOCUMENTS[1:]:
        (cache / name).unlink()
    replace = os.replace
    written: list[str] = []

    class Killed(BaseException):
        pass

    def killed(source: Path, target: Path) -> None:
        if len(written) == 3:
            raise Killed
        written.append(str(target.relative_to(cache)))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(Killed):
            mend(cache)
    assert written == list(DOCUMENTS[1:4])
    left = [finding.path.name for finding in verify_cache(cache)]
    assert left == ["zarr.json"] * 4 + [".zarr.json.partial"]
    mend(cache)
    assert folder_contents(cache) == folder_contents(whole)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of format version 1, whose group has one document."""
    path = tmp_path_factory.mktemp("metadata") / "old"
    synthetic_cache(
        path, num_rows=11, shard_rows=4, columns=COLUMNS, invalid={5: "cut off"}, format_version=1
    )
    return path


def lose_checksum_of(data: bytes) -> bytes:
    group = json.loads(data)
    del group["attributes"]["repa_sha256"]
    return json.dumps(group).encode()


GROUP_DAMAGES: tuple[Callable[[bytes], bytes | None], ...] = (
    lambda data: None,
    lambda data: b"",
    lambda data: data[:-1],
    lambda data: data[: data.index(b'repa_sha256": "') + 15 + 40],
    lambda data: data + b"{",
    lambda data: data.replace(b'"attributes"', b'"atributes"'),
    lambda data: data.replace(b'"num_rows": 11', b'"num_rows": 12'),
    lambda data: b"{}",
    lose_checksum_of,
)


def damage_group(cache: Path, damage: Callable[[bytes], bytes | None]) -> None:
    file = cache / "zarr.json"
    damaged = damage(file.read_bytes())
    if damaged is None:
        file.unlink()
    else:
        file.write_bytes(damaged)


@pytest.mark.parametrize("damage", GROUP_DAMAGES)
def test_a_damaged_group_is_taken_from_its_copy(
    damage: Callable[[bytes], bytes | None], cache: Path, whole: Path
) -> None:
    damage_group(cache, damage)
    with pytest.raises(CacheError) as caught:
        open_manifest(cache)
    assert caught.value.remedy == AGAIN
    mend(cache)
    assert folder_contents(cache) == folder_contents(whole)


@pytest.mark.parametrize("damage", GROUP_DAMAGES)
def test_without_a_sound_copy_nothing_is_guessed(
    damage: Callable[[bytes], bytes | None], cache: Path, old: Path, tmp_path: Path
) -> None:
    (cache / "zarr.json.copy").write_bytes((cache / "zarr.json.copy").read_bytes()[:-1])
    for path in (cache, shutil.copytree(old, tmp_path / "old")):
        damage_group(path, damage)
        before = folder_contents(path)
        with pytest.raises(CacheError) as caught:
            mend(path)
        assert caught.value.remedy == RESTORE
        assert folder_contents(path) == before


def test_a_copy_that_says_something_else_is_written_again(cache: Path, whole: Path, tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "other", num_rows=11, shard_rows=4)
    copy = cache / "zarr.json.copy"
    for data in (None, b"", copy.read_bytes()[:-1], (tmp_path / "other" / "zarr.json").read_bytes()):
        if data is None:
            copy.unlink()
        else:
            copy.write_bytes(data)
        (finding,) = verify_cache(cache)
        assert (finding.path, finding.remedy) == (copy, AGAIN)
        mend(cache)
        assert folder_contents(cache) == folder_contents(whole)


FIRST = "{cache}/commits/demo/0.json (rows 0 to 3 of demo/cls, demo/patch)"
FLOATS = {name: ColumnSpec(shape=(2, *spec.shape), dtype="float32") for name, spec in COLUMNS.items()}
PACKED = {
    name: ColumnSpec(shape=spec.shape, dtype="int8", compressor="zstd") for name, spec in COLUMNS.items()
}


@pytest.mark.parametrize(
    ("other", "first", "second"),
    [
        (
            {"shard_rows": 8},
            FIRST,
            "sd-vae/moments/zarr.json",
        ),
        ({"num_rows": 13}, FIRST, "keys.txt"),
        (
            {"views": ("a", "b")},
            FIRST,
            "sd-vae/moments/zarr.json",
        ),
        (
            {"columns": FLOATS},
            FIRST,
            "sd-vae/moments/zarr.json",
        ),
        ({"columns": PACKED}, FIRST, "sd-vae/moments/zarr.json"),
        (
            {"num_rows": 30, "columns": {"other/patch": COLUMNS["demo/patch"]}},
            FIRST,
            "keys.txt",
        ),
    ],
)
def test_the_manifest_of_another_cache_is_refused_and_nothing_touched(
    other: dict[str, Any], first: str, second: str, cache: Path, whole: Path, tmp_path: Path
) -> None:
    synthetic_cache(tmp_path / "other", **{"num_rows": 11, "shard_rows": 4, "columns": COLUMNS, **other})
    for name in ("zarr.json", "zarr.json.copy"):
        shutil.copy(tmp_path / "other" / name, cache / name)
    before = folder_contents(cache)
    assert verify_cache(cache)
    with pytest.raises(CacheError) as caught:
        mend(cache)
    assert str(caught.value) == (
        f"the manifest in {cache}/zarr.json is of another cache: neither {first.format(cache=cache)} nor "
        f"{cache}/{second} is as it says; restore the file that was there"
    )
    assert folder_contents(cache) == before
    for name in ("zarr.json", "zarr.json.copy"):
        shutil.copy(whole / name, cache / name)
    assert verify_cache(cache) == []


def test_a_record_that_does_not_fit_alone_is_not_the_manifests_fault(cache: Path, tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "other", num_rows=11, shard_rows=8)
    shutil.copy(tmp_path / "other" / "commits" / "demo" / "1.json", cache / "commits" / "demo" / "1.json")
    plan = plan_repair(cache, verify_cache(cache))
    assert plan.shards == {"demo": (1,)}


def test_keys_of_other_images_are_not_written_over(cache: Path) -> None:
    manifest = open_manifest(cache)
    keys, labels = read_keys(cache, manifest), read_labels(cache, manifest)
    sound = (cache / "keys.txt").read_bytes()
    (cache / "keys.txt").write_bytes(sound[:-9] + b"\xff")
    restore_tables(cache, manifest, keys, labels)
    assert (cache / "keys.txt").read_bytes() == sound
    (cache / "keys.txt").write_text("somebody\nelse\n")
    with pytest.raises(CacheError) as caught:
        restore_tables(cache, manifest, keys, labels)
    assert str(caught.value) == (
        f"{cache}/keys.txt has none of the keys that the manifest in {cache}/zarr.json is of, so one of the "
        "two is of another cache; restore the one that is, or delete keys.txt if that is it"
    )
    assert (cache / "keys.txt").read_text() == "somebody\nelse\n"
    (cache / "keys.txt").unlink()
    restore_tables(cache, manifest, keys, labels)
    assert (cache / "keys.txt").read_bytes() == sound


def test_attributes_that_others_gave_the_group_stay(cache: Path) -> None:
    file = cache / "zarr.json"
    group = json.loads(file.read_text())
    group["attributes"]["owner"] = "somebody"
    group["node_type"] = "array"
    file.write_text(json.dumps(group))
    assert mend(cache).splitlines()[-1] == f"{cache}: all is as committed"
    kept = json.loads(file.read_text())
    assert kept["attributes"]["owner"] == "somebody"
    assert kept["node_type"] == "group"
    assert open_manifest(cache).num_rows == 11
