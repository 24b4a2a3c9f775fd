"""`upgrade_cache`: a cache of version 1 becomes the one that is written today, whenever it was stopped."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

import bucket_caches
import numpy as np
import pytest
from bucket_caches import Life, files_of, objects_but_locks
from repa.data.errors import CacheError
from repa.data.format.columns import ColumnSpec
from repa.data.format.opening import open_manifest
from repa.data.reading.reader import CacheReader
from repa.data.storage.bucket import cache_path
from repa.data.testing import (
    SYNTHETIC_COLUMNS,
    expected_row,
    folder_contents,
    synthetic_cache,
    synthetic_captions,
)
from repa.data.upkeep.upgrade import upgrade_cache
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.writer import SourceWriter
from s3_server import upload
from store_on_disk import Killed, life_of

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = {**SYNTHETIC_COLUMNS, "demo/cls": ColumnSpec(shape=(16,), dtype="float16", compressor="zstd")}


def make(path: Path, version: int, *, num_rows: int = 11) -> Path:
    synthetic_cache(
        path,
        num_rows=num_rows,
        shard_rows=4,
        columns=COLUMNS,
        invalid={9: "cut off"},
        views=("original", "mirrored"),
        format_version=version,
    )
    return path


def files(path: Path) -> dict[str, str]:
    return {name: digest for name, digest in folder_contents(path).items() if digest != "folder"}


def test_it_becomes_the_cache_that_is_written_today(tmp_path: Path) -> None:
    old, new = make(tmp_path / "old", 1), make(tmp_path / "new", 2)
    assert open_manifest(old).format_version == 1
    assert files(old) != files(new)
    assert upgrade_cache(old)
    assert files(old) == files(new)
    assert not upgrade_cache(old)


def test_in_a_bucket_stopped_or_not_it_becomes_the_same(server: str, tmp_path: Path) -> None:
    old, new = make(tmp_path / "old", 1), make(tmp_path / "new", 2)
    expected = files_of(new)
    for step in (4, 11, 19, 1000):
        url = f"s3://bucket/upgrade/{step}"
        upload(old, url)
        with pytest.MonkeyPatch.context() as patch:
            life = Life(patch, step)
            with suppress(bucket_caches.Killed):
                upgrade_cache(cache_path(url))
        if life.left < 0:
            with CacheReader(url, list(COLUMNS)) as reader:
                assert reader.manifest.format_version == 1
            assert upgrade_cache(cache_path(url))
        assert objects_but_locks(url) == expected
        assert not upgrade_cache(cache_path(url))


def test_stopped_anywhere_it_can_be_used_and_gone_on_with(tmp_path: Path) -> None:
    whole, new = make(tmp_path / "whole", 1), make(tmp_path / "new", 2)
    expected = files(new)
    for moment in range(0, 1000, 2):
        cache = shutil.copytree(whole, tmp_path / f"cache-{moment}")
        try:
            with life_of(moment):
                upgrade_cache(cache)
        except Killed:
            pass
        else:
            break
        with CacheReader(cache, ["demo/cls"]) as reader:
            out = np.empty((1, 16), dtype=np.float16)
            reader.read_rows(np.array([7]), ["demo/cls"], {"demo/cls": out})
        assert np.array_equal(out[0], expected_row("demo/cls", 7, COLUMNS["demo/cls"]))
        assert {finding.path.name[-8:] for finding in verify_cache(cache)} <= {".partial"}
        # killed before the very last rename it is of version 1, and after it there is nothing left to do
        assert upgrade_cache(cache) == (open_manifest(whole).format_version == 1)
        assert {name for name in files(cache) if not name.endswith(".partial")} == expected.keys()
        assert all(files(cache)[name] == digest for name, digest in expected.items())
        shutil.rmtree(cache)
    assert moment > 20


def test_what_is_not_as_committed_is_not_given_a_new_record(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", 1)
    place = "sd-vae/moments/c/{}/0/0/0/0"
    before = {}
    for name in ("exchanged", "checksum", "index", "missing"):
        cache = before[name] = shutil.copytree(whole, tmp_path / name)
        file = cache / place.format(0)
        if name == "exchanged":
            shutil.copy(whole / place.format(1), file)
        elif name == "missing":
            file.unlink()
        else:
            data = bytearray(file.read_bytes())
            data[SYNTHETIC_COLUMNS["sd-vae/moments"].row_bytes if name == "checksum" else -9] ^= 1
            file.write_bytes(data)
        with pytest.raises(CacheError) as caught:
            upgrade_cache(cache)
        assert caught.value.remedy
        assert open_manifest(cache).format_version == 1
    with SourceWriter(whole, open_manifest(whole), "demo", [1]), pytest.raises(CacheError):
        upgrade_cache(whole)
    os.unlink(whole / "commits" / "demo" / "1.json")
    # a cache that is not complete is upgraded as far as it has come
    assert upgrade_cache(whole)
    assert {finding.shard for finding in verify_cache(whole)} == {1}


def test_captions_stay_those_of_a_cache_that_is_upgraded(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=5, format_version=1)
    synthetic_captions(tmp_path / "cache")
    before = folder_contents(tmp_path / "cache" / "captions")
    assert upgrade_cache(tmp_path / "cache")
    assert verify_cache(tmp_path / "cache") == []
    assert folder_contents(tmp_path / "cache" / "captions") == before
