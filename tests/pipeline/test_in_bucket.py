"""`repa preprocess` straight into a bucket of an S3 server on loopback."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from bucket_caches import Killed, Life, files_of
from captioned_images import save_coco, save_images
from demo_pictures import draw_pictures, flags_for
from repa.commands.cache.repair import repair
from repa.commands.cache.seal import seal
from repa.commands.preprocess import make_config, preprocess
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import attention_source
from repa.data.format.opening import open_manifest
from repa.data.format.survey import committed_shards
from repa.data.storage.bucket import cache_path
from repa.data.upkeep.latent_statistics import settle_latent_statistics
from repa.data.upkeep.verify import verify_cache
from repa.pipeline.plan import make_plan, require_room_for
from repa.pipeline.run import run, saved
from repa.pipeline.shard_loop.on_ray import EncodeShard
from rich.console import Console
from s3_server import empty, lead_to, objects_of, obstore, s3_server

if TYPE_CHECKING:
    from collections.abc import Iterator

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address, pytest.MonkeyPatch.context() as patch:
        empty(address)
        lead_to(patch, address)
        yield address


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("drawn") / "pictures")


@pytest.fixture(scope="module")
def whole(drawn: Path) -> dict[str, bytes]:
    """The files of the cache of the pictures, in a folder."""
    cache = drawn.parent / "cache"
    preprocess(flags_for(drawn, cache), console=QUIET)
    return files_of(cache)


def test_parts_and_a_teacher_added_later_give_the_bytes_of_a_folder(
    server: str, drawn: Path, whole: dict[str, bytes]
) -> None:
    url = "s3://bucket/parts/cache"
    more = {"attention": "3,6", "attention_rank": 4}
    preprocess(flags_for(drawn, url, shards="1:3"), console=QUIET)
    with pytest.raises(CacheError) as caught:
        seal(cache=url, console=QUIET)
    assert caught.value.field == "sd-vae"
    preprocess(flags_for(drawn, url, shards=":1"), console=QUIET)
    before = objects_of(url)
    preprocess(flags_for(drawn, url, **more), console=QUIET)
    after = objects_of(url)
    assert {name for name, data in before.items() if after[name] != data} == {"zarr.json", "zarr.json.copy"}
    folder = drawn.parent / "folder"
    shutil.copytree(drawn.parent / "cache", folder)
    preprocess(flags_for(drawn, folder, **more), console=QUIET)
    assert after == files_of(folder)
    assert "calibration/demo+attention.safetensors" in after
    output = io.StringIO()
    preprocess(flags_for(drawn, url, **more), console=Console(file=output, width=200))
    assert "nothing to do" in output.getvalue()
    seal(cache=url, console=QUIET)
    assert objects_of(url) == after
    store = obstore.store.from_url(url)
    obstore.put(store, "demo/cls/c/1/0/0", b"damaged")
    obstore.put(store, "commits/demo/2.json", b"{}")
    obstore.delete(store, "demo/patch/zarr.json")
    obstore.put(store, "keys.txt", b"")
    obstore.put(store, "valid/c/2", b"0")
    obstore.put(store, "zarr.json", b"damaged")
    remedies = [finding.remedy for finding in verify_cache(cache_path(url))]
    assert remedies == ["have it written again by `repa cache repair`"]
    repair(cache=url, data=str(drawn), console=QUIET)
    assert objects_of(url) == after


@pytest.mark.parametrize("step", [27, 46])
def test_killed_and_repeated_it_gives_the_same_bytes(
    server: str, drawn: Path, whole: dict[str, bytes], step: int
) -> None:
    url = f"s3://bucket/killed/{step}"
    with pytest.MonkeyPatch.context() as patch:
        life = Life(patch, step)
        with suppress(Killed):
            preprocess(flags_for(drawn, url), console=QUIET)
    assert life.left < 0
    assert objects_of(url) != whole
    preprocess(flags_for(drawn, url), console=QUIET)
    assert objects_of(url) == whole


def test_what_a_worker_of_ray_does_of_each_shard_makes_the_whole(
    server: str, drawn: Path, whole: dict[str, bytes]
) -> None:
    url = "s3://bucket/ray/cache"
    plan = make_plan(make_config(flags_for(drawn, url)))
    sources = tuple(source.source for source in plan.sources)
    # as Ray hands it to another process
    config = pickle.loads(pickle.dumps(plan.config))
    for shard in (2, 0, 1):
        worker = EncodeShard(config, plan.manifest, sources, 0.0, 1, str(Path.cwd()))
        for _ in range(2):  # a shard may be given out again
            answer = json.loads(worker({"shard": np.array([shard])})["answer"][0])
            assert "error" not in answer
    settle_latent_statistics(config.cache)
    assert objects_of(url) == whole
    assert [each.missing for each in make_plan(make_config(flags_for(drawn, url))).sources] == [(), ()]


def test_captions_go_there_too(server: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tiny_text import save_clip

    save_images(tmp_path / "images")
    save_coco(tmp_path / "captions.json")
    save_clip(tmp_path / "clip", tmp_path / "clip", seed=1)
    flags = flags_for(
        tmp_path / "images",
        tmp_path / "cache",
        encoders=["none"],
        resolution=64,
        captions=str(tmp_path / "captions.json"),
        text_encoders=["clip-l-text"],
        weights=[f"clip-l-text={tmp_path / 'clip'}"],
        batch_size=3,
        workers=0,
    )
    preprocess(flags, console=QUIET)
    url = "s3://bucket/captions/cache"
    preprocess(replace(flags, cache=url), console=QUIET)
    assert objects_of(url) == files_of(tmp_path / "cache")
    assert any(name.startswith("captions/clip-l-text/states/c/") for name in objects_of(url))


def test_an_upload_that_fails_loses_its_shard_and_says_what_is_saved(
    server: str, drawn: Path, whole: dict[str, bytes]
) -> None:
    url = "s3://bucket/fails/cache"
    opened = obstore.open_writer

    def broken(store: Any, name: str, **options: Any) -> Any:
        if name.startswith("demo/patch/c/2/"):
            raise obstore.exceptions.GenericError("the connection was reset")
        return opened(store, name, **options)

    plan = make_plan(make_config(flags_for(drawn, url)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obstore, "open_writer", broken)
        with pytest.raises(RepaError) as caught:
            run(plan.config, QUIET)
    assert "\n" not in str(caught.value)
    path = cache_path(url)
    assert committed_shards(path, open_manifest(path), "demo") == [0, 1]
    assert "8 of 12 images of demo" in saved(plan)
    run(plan.config, QUIET)
    assert objects_of(url) == whole


def test_nothing_is_written_where_it_cannot_be_finished(
    server: str, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(url: str, **flags: Any) -> RepaError:
        with pytest.raises(RepaError) as caught:
            preprocess(flags_for(drawn, url, **flags), console=QUIET)
        assert "\n" not in str(caught.value)
        assert caught.value.remedy
        return caught.value

    refused("s3://no-such-bucket/cache")
    obstore.put(obstore.store.from_url("s3://bucket/foreign"), "picture.png", b"1")
    assert isinstance(refused("s3://bucket/foreign"), CacheError)
    assert objects_of("s3://bucket/foreign") == {"picture.png": b"1"}
    put = obstore.put
    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put", lambda to, name, data, mode=None, **rest: put(to, name, data, **rest))
        assert refused("s3://bucket/unconditional").field == "--cache"
    assert objects_of("s3://bucket/unconditional") == {}
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:1")
        assert refused("s3://bucket/x").field == "AWS_ENDPOINT_URL"


def test_a_bucket_is_never_too_small(server: str, drawn: Path) -> None:
    plan = make_plan(make_config(flags_for(drawn, "s3://bucket/room/cache")))
    assert plan.free_bytes is None
    assert plan.fits
    plan.require_room(1 << 60)
    sources = {source.source: source.columns for source in plan.sources}
    require_room_for(plan.config.cache, plan.manifest, sources, False)
    assert attention_source("demo") not in sources
    assert objects_of("s3://bucket/room/cache") == {}
