"""`drop_source`: afterwards the cache is as if the source had never been added, whenever it was killed."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from bucket_caches import Killed, Life, files_of, objects_but_locks
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.format.opening import open_manifest
from repa.data.format.survey import committed_shards
from repa.data.storage.bucket import cache_path
from repa.data.testing import SYNTHETIC_COLUMNS, folder_contents, synthetic_cache
from repa.data.upkeep.drop import drop_source
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.calibrations import ensure_calibration
from repa.data.writing.store import ensure_source
from repa.data.writing.writer import SourceWriter
from s3_server import upload

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ATTENTION = {name: ColumnSpec(shape=(1, 2, 4, 8), dtype="float16") for name in ("demo/q", "demo/k")}
ALL = {**SYNTHETIC_COLUMNS, **ATTENTION}
INVALID = {3: "truncated"}


def make(path: Path, columns: Mapping[str, ColumnSpec]) -> Path:
    synthetic_cache(path, num_rows=20, columns=columns, invalid=INVALID)
    return path


def without(source: str) -> dict[str, ColumnSpec]:
    names = {
        "sd-vae": ["sd-vae/moments"],
        "demo": ["demo/patch", "demo/cls"],
        "demo+attention": ["demo/q", "demo/k"],
    }
    return {name: spec for name, spec in ALL.items() if name not in names[source]}


def files(path: Path) -> dict[str, str]:
    """The files of a cache; an empty folder is nobody's."""
    return {name: digest for name, digest in folder_contents(path).items() if digest != "folder"}


@pytest.mark.parametrize("source", ["demo", "demo+attention", "sd-vae"])
def test_as_if_it_had_never_been_added(source: str, tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", ALL)
    if source == "demo":
        ensure_calibration(cache, source, lambda: b"fitted")
    manifest = drop_source(cache, source, autoencoder=True)
    assert source not in manifest.sources
    assert open_manifest(cache) == manifest
    assert folder_contents(cache) == folder_contents(make(tmp_path / "never", without(source)))
    assert verify_cache(cache) == []


def test_what_was_killed_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every file that is removed or renamed; what is left in between opens, and may be added again."""
    make(tmp_path / "never", {MOMENTS: ALL[MOMENTS]})
    make(tmp_path / "whole", SYNTHETIC_COLUMNS)
    expected = files(tmp_path / "never")
    calls: list[str] = []

    class Killed(BaseException):
        pass

    def dying(real: Any, at: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if len(calls) >= at:
                raise Killed
            calls.append(real.__name__)
            return real(*arguments, **options)

        return call

    reached = 0
    for moment in range(200):
        cache = shutil.copytree(tmp_path / "whole", tmp_path / f"cache-{moment}")
        calls.clear()
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "replace"):
                patch.setattr(os, name, dying(getattr(os, name), moment))
            try:
                drop_source(cache, "demo")
            except Killed:
                reached += 1
            else:
                break
        manifest = open_manifest(cache)
        if "demo" not in manifest.sources and moment % 2:
            # its records, if any are left, are of nothing: another declaration must not find them
            declared = open_manifest(tmp_path / "never").sources["sd-vae"]
            again = ensure_source(cache, "demo", declared, {"demo/cls": ALL["demo/cls"]})
            assert committed_shards(cache, again, "demo") == []
        if files(cache) != expected:
            drop_source(cache, "demo")
        assert files(cache) == expected
        shutil.rmtree(cache)
    assert reached > 10
    assert files(cache) == expected


def test_in_a_bucket_killed_at_any_request_it_is_finished(server: str, tmp_path: Path) -> None:
    small = {"num_rows": 7, "shard_rows": 4, "invalid": INVALID}
    moments = {MOMENTS: ALL[MOMENTS]}
    synthetic_cache(tmp_path / "whole", columns=SYNTHETIC_COLUMNS, **small)
    synthetic_cache(tmp_path / "never", columns=moments, **small)
    ensure_calibration(tmp_path / "whole", "demo", lambda: b"fitted")
    expected = files_of(tmp_path / "never")
    killed = 0
    for step in range(0, 100, 6):
        url = f"s3://bucket/drop/{step}"
        upload(tmp_path / "whole", url)
        with pytest.MonkeyPatch.context() as patch:
            life = Life(patch, step)
            with suppress(Killed):
                drop_source(cache_path(url), "demo")
        if life.left >= 0:
            break
        killed += 1
        with suppress(CacheError):  # only locks were left
            drop_source(cache_path(url), "demo")
        claim = SourceWriter(cache_path(url), open_manifest(cache_path(url)), "sd-vae", [0])
        with claim:
            pass  # who writes next clears the locks of the killed
        assert objects_but_locks(url) == expected, f"killed at step {step}"
    assert killed > 4
    assert objects_but_locks(url) == expected


def test_what_is_refused(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache", ALL)
    before = folder_contents(cache)
    for source in ("sd-vae", "dinov2-b"):
        with pytest.raises(CacheError) as caught:
            drop_source(cache, source)
        assert caught.value.field == "SOURCE"
        assert caught.value.remedy
    for source in ("../other", "demo/patch", "", "label", "valid"):
        with pytest.raises(RepaError):
            drop_source(cache, source)
    manifest = open_manifest(cache)
    with SourceWriter(cache, manifest, "demo", [1]), pytest.raises(CacheError):
        drop_source(cache, "demo")
    assert folder_contents(cache) == before
    with pytest.raises(CacheError):
        drop_source(tmp_path / "none", "demo")
