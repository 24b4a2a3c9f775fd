"""A cache written into a bucket of an S3 server on loopback, compared with one written to a folder."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from bucket_caches import Killed, Life, Sleep, files_of
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.format.opening import open_manifest
from repa.data.format.survey import committed_shards
from repa.data.reading.reader import CacheReader
from repa.data.storage.bucket import Bucket, cache_path
from repa.data.storage.writable import open_writable
from repa.data.testing import (
    expected_row,
    synthetic_cache,
    synthetic_captions,
    synthetic_provenance,
)
from repa.data.upkeep.latent_statistics import settle_latent_statistics
from repa.data.upkeep.seal import seal_cache
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.calibrations import ensure_calibration, read_calibration
from repa.data.writing.store import ensure_source
from repa.data.writing.writer import ShardTakenError, SourceWriter
from s3_server import objects_of, obstore

if TYPE_CHECKING:
    from pathlib import Path

MOMENTS = ColumnSpec(shape=(8, 2, 2), dtype="float32")
PATCH = ColumnSpec(shape=(4, 6), dtype="float16", compressor="zstd")
SMALL: dict[str, Any] = {
    "num_rows": 7,
    "shard_rows": 4,
    "invalid": {5: "bad"},
    "columns": {"sd-vae/moments": MOMENTS, "demo/patch": PATCH},
}
LARGE: dict[str, Any] = {**SMALL, "num_rows": 19, "views": ("original", "mirrored")}


def write_shards(url: str, source: str, shards: list[int]) -> None:
    """Write shards of a declared source, as a process of its own would."""
    path = cache_path(url)
    manifest = open_manifest(path)
    with SourceWriter(path, manifest, source, shards) as writer:
        for shard in writer.remaining:
            with writer.shard(shard) as rows:
                for row in rows.rows:
                    for column, spec in manifest.source_columns(source).items():
                        rows.write(row, column, expected_row(column, row, spec)[None])
                rows.commit()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the small cache, in a folder."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    synthetic_cache(path, **SMALL)
    return files_of(path)


def test_a_cache_in_a_bucket_is_the_one_of_a_folder_byte_by_byte(server: str, tmp_path: Path) -> None:
    url = "s3://bucket/whole/cache"
    for path in (tmp_path / "cache", cache_path(url)):
        synthetic_cache(path, **LARGE)
        synthetic_captions(path)
        ensure_calibration(path, "demo", lambda: b"fitted")
        settle_latent_statistics(path)
    assert objects_of(url) == files_of(tmp_path / "cache")
    assert [each.what for each in verify_cache(cache_path(url)) if "calibration" not in str(each.path)] == []
    sealed = seal_cache(cache_path(url))
    assert sealed.latents == seal_cache(tmp_path / "cache").latents
    assert read_calibration(cache_path(url), "demo") == b"fitted"
    out = {"demo/patch": np.zeros((2, *PATCH.shape), PATCH.numpy_dtype)}
    with CacheReader(url, ["demo/patch"]) as reader, ThreadPoolExecutor(2) as pool:
        rows, views = np.array([3, 18]), np.array([0, 1])
        reader.read_rows(rows, ["demo/patch"], out, views=views, pool=pool, parts=2)
    assert np.array_equal(out["demo/patch"][0], expected_row("demo/patch", 3, PATCH, view=0))
    assert np.array_equal(out["demo/patch"][1], expected_row("demo/patch", 18, PATCH, view=1))


def test_killed_at_any_request_the_same_again_gives_the_same_bytes(
    server: str, whole: dict[str, bytes]
) -> None:
    states = set()
    for step in range(1, 1000, 4):
        url = f"s3://bucket/killed/{step}"
        with pytest.MonkeyPatch.context() as patch:
            life = Life(patch, step)
            with suppress(Killed):
                synthetic_cache(cache_path(url), **SMALL)
        if (cache_path(url) / "zarr.json").exists():
            manifest = open_manifest(cache_path(url))
            for source in manifest.sources:
                states.add(len(committed_shards(cache_path(url), manifest, source)))
        synthetic_cache(cache_path(url), **SMALL)
        assert objects_of(url) == whole, f"killed at step {step}"
        if life.left >= 0:
            break
    assert step > 30
    assert states == {0, 1, 2}


def test_a_probe_of_another_process_is_in_nobodys_way(server: str, whole: dict[str, bytes]) -> None:
    url = "s3://bucket/probed/cache"
    opened = open_writable(cache_path(url))
    with pytest.MonkeyPatch.context() as patch:
        # what another process has put there, or has left when it was killed
        patch.setattr(Bucket, "delete", lambda *_: None)
        opened.probe()  # type: ignore[attr-defined]
    (probe,) = objects_of(url)
    synthetic_cache(cache_path(url), **SMALL)
    there = objects_of(url)
    assert there.pop(probe) == b"1"
    assert there == whole


@pytest.mark.parametrize(
    ("request_", "ending"),
    [
        ("put", "label/c/0"),
        ("put", "sd-vae/moments/zarr.json"),
        ("list", "sd-vae/moments/c"),
        ("list_with_delimiter", "commits/demo/.writers"),
        ("head", "commits/sd-vae/1.json"),
        ("get", "commits/sd-vae/0.json"),
        ("get", "valid/c/0"),
        ("put", "valid/c/1"),
        ("put", "commits/sd-vae/1.json"),
    ],
)
def test_asleep_for_longer_than_its_lease_it_writes_over_nothing(
    server: str, tmp_path: Path, request_: str, ending: str
) -> None:
    """Another process writes all of it, and a source more that has other invalid rows, meanwhile."""
    url = f"s3://bucket/asleep/{request_}/{ending.replace('/', '-')}"
    more = {**SMALL, "columns": {"other/cls": ColumnSpec(shape=(3,), dtype="float16")}, "invalid": {2: "x"}}

    def all_of_it(root: Any) -> None:
        synthetic_cache(root, **SMALL)
        synthetic_cache(root, **more)

    with pytest.MonkeyPatch.context() as patch:
        sleep = Sleep(patch, request_, ending, lambda: all_of_it(cache_path(url)))
        with suppress(CacheError):
            synthetic_cache(cache_path(url), **SMALL)
        assert sleep.slept
    all_of_it(tmp_path / "cache")
    assert objects_of(url) == files_of(tmp_path / "cache")


def test_a_process_killed_9_leaves_what_another_goes_on_with(server: str, whole: dict[str, bytes]) -> None:
    url = "s3://bucket/killed9/cache"
    script = """
import sys
import repa.data.storage.bucket_folder as folder
from repa.data.format.columns import ColumnSpec
from repa.data.storage.bucket import Bucket, cache_path
from repa.data.storage.writable import open_writable
from repa.data.testing import synthetic_cache

publish, published = folder._Upload.publish, []

def held(self):
    if len(published) == 2:
        print("held", flush=True)
        sys.stdin.read()
    publish(self)
    published.append(self)

folder._Upload.publish = held
columns = {"sd-vae/moments": ColumnSpec(shape=(8, 2, 2), dtype="float32")}
columns["demo/patch"] = ColumnSpec(shape=(4, 6), dtype="float16", compressor="zstd")
synthetic_cache(cache_path(sys.argv[1]), num_rows=7, shard_rows=4, invalid={5: "bad"}, columns=columns)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        manifest = open_manifest(cache_path(url))
        with pytest.raises(ShardTakenError), SourceWriter(cache_path(url), manifest, "demo", [1, 0]):
            pass
        process.kill()
    assert committed_shards(cache_path(url), manifest, "sd-vae") == [0, 1]
    assert committed_shards(cache_path(url), manifest, "demo") == []
    synthetic_cache(cache_path(url), **SMALL)
    assert objects_of(url) == whole


def test_several_write_shards_of_one_source_and_another_source_beside_them(
    server: str, tmp_path: Path
) -> None:
    url = "s3://bucket/several/cache"
    plain = {"num_rows": 24, "shard_rows": 4}
    columns = {"sd-vae/moments": MOMENTS, "demo/patch": PATCH}
    synthetic_cache(tmp_path / "cache", columns=columns, **plain)
    manifest = synthetic_cache(cache_path(url), columns={"sd-vae/moments": MOMENTS}, **plain)
    before = objects_of(url)
    failures: list[BaseException] = []

    def add(shards: list[int]) -> None:
        try:
            specs = {"demo/patch": PATCH}
            ensure_source(cache_path(url), "demo", synthetic_provenance("demo", specs), specs)
            write_shards(url, "demo", shards)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=add, args=(list(range(first, 6, 3)),)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert objects_of(url) == files_of(tmp_path / "cache")
    # another source rewrites nothing but what says that it is there
    changed = {name for name, data in objects_of(url).items() if before.get(name, data) != data}
    assert changed == {"zarr.json", "zarr.json.copy"}
    other = {"demo/patch": ColumnSpec(shape=(4, 7), dtype="float16")}
    with pytest.raises(CacheError):
        ensure_source(cache_path(url), "demo", synthetic_provenance("demo", other), other)
    assert manifest.num_shards == 6


def test_a_declaration_that_nothing_was_written_of_gives_way(server: str, tmp_path: Path) -> None:
    url = "s3://bucket/again/cache"
    moments = {"sd-vae/moments": MOMENTS}
    for path in (tmp_path / "cache", cache_path(url)):
        synthetic_cache(path, num_rows=7, shard_rows=4, columns=moments)
        for width in (9, 6):
            specs = {"demo/patch": ColumnSpec(shape=(4, width), dtype="float16")}
            manifest = ensure_source(path, "demo", synthetic_provenance("demo", specs), specs)
            # an upload that another began does not stand in the way
            with SourceWriter(path, manifest, "demo", [0]) as writer, writer.shard(0) as shard:
                shard.write(0, "demo/patch", np.zeros((1, 4, width), np.float16))
    assert objects_of(url) == files_of(tmp_path / "cache")


def test_a_shard_that_another_wrote_meanwhile_is_not_written_over(server: str, tmp_path: Path) -> None:
    url = "s3://bucket/meanwhile/cache"
    manifest = synthetic_cache(cache_path(url), **SMALL)
    ours = cache_path(url)
    with SourceWriter(ours, manifest, "sd-vae", [0]) as writer, writer.shard(0) as shard:
        for row in range(4):
            shard.write(row, "sd-vae/moments", np.zeros((1, *MOMENTS.shape), np.float32))
        record = objects_of(url)["commits/sd-vae/0.json"]
        real = type(shard)._publish

        def publish(self: Any, *about: Any) -> None:
            obstore.put(obstore.store.from_url(url), "commits/sd-vae/0.json", record)
            real(self, *about)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(shard), "_publish", publish)
            with pytest.raises(ShardTakenError):
                shard.commit()
    assert objects_of(url)["commits/sd-vae/0.json"] == record


def test_a_manifest_that_another_wrote_meanwhile_is_not_written_over(server: str) -> None:
    url = "s3://bucket/manifest/cache"
    synthetic_cache(cache_path(url), num_rows=7, shard_rows=4, columns={"sd-vae/moments": MOMENTS})
    specs = {"demo/patch": PATCH}
    store = obstore.store.from_url(url)
    real = obstore.put

    def put(to: Any, name: str, data: bytes, **options: Any) -> Any:
        if name == "zarr.json.copy":
            real(store, "zarr.json", objects_of(url)["zarr.json"] + b"\n")
        return real(to, name, data, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obstore, "put", put)
        with pytest.raises(CacheError):
            ensure_source(cache_path(url), "demo", synthetic_provenance("demo", specs), specs)
    assert "demo" not in open_manifest(cache_path(url)).sources


def test_a_prefix_of_something_else_is_left_as_it_is(server: str) -> None:
    url = "s3://bucket/foreign"
    store = obstore.store.from_url(url)
    obstore.put(store, "picture.png", b"1")
    with pytest.raises(CacheError):
        synthetic_cache(cache_path(url), **SMALL)
    assert objects_of(url) == {"picture.png": b"1"}


def test_an_upload_that_fails_loses_its_shard_alone(server: str, whole: dict[str, bytes]) -> None:
    url = "s3://bucket/fails/cache"
    opened = obstore.open_writer

    def broken(store: Any, name: str, **options: Any) -> Any:
        if name.startswith("demo/patch/c/1/"):
            raise obstore.exceptions.GenericError("the connection was reset")
        return opened(store, name, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obstore, "open_writer", broken)
        with pytest.raises(RepaError) as caught:
            synthetic_cache(cache_path(url), **SMALL)
    assert "\n" not in str(caught.value)
    assert "demo/patch/c/1/" in caught.value.what
    assert "same command again" in caught.value.remedy
    manifest = open_manifest(cache_path(url))
    assert committed_shards(cache_path(url), manifest, "demo") == [0]
    synthetic_cache(cache_path(url), **SMALL)
    assert objects_of(url) == whole
