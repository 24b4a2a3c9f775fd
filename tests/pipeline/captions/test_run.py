"""Captions encoded beside images, once each, resumed, by several processes, and added to what is there."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from captioned_images import CAPTIONS, TEXTS, save_coco, save_images
from repa.commands.preprocess import PreprocessFlags, make_config
from repa.data.errors import CacheError, RepaError
from repa.data.format.captions import captions_path, read_captions, read_record
from repa.data.format.opening import open_manifest
from repa.data.testing import folder_contents
from repa.data.units import human_bytes
from repa.data.upkeep.latent_statistics import settle_latent_statistics
from repa.data.upkeep.verify import verify_cache
from repa.pipeline.captions.plan import make_caption_plan
from repa.pipeline.captions.run import show_captions
from repa.pipeline.config import PreprocessConfig
from repa.pipeline.plan import make_plan
from repa.pipeline.run import run
from repa.pipeline.shard_loop.writer_thread import WriterThread
from repa.pipeline.text.encoder import load_text_encoder
from repa.pipeline.text.facts import TEXT_ENCODERS
from rich.console import Console
from tiny_text import save_clip, save_t5

if TYPE_CHECKING:
    from pathlib import Path

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions")
    save_images(path / "images")
    save_coco(path / "captions.json")
    save_clip(path / "clip", path / "clip", seed=1)
    save_t5(path / "t5", path / "t5", seed=3)
    run(config(path, cache=path / "cache"), QUIET)
    return path


def config(place: Path, **settings: Any) -> PreprocessConfig:
    options: dict[str, Any] = {
        "data": str(place / "images"),
        "encoders": (),
        "vae": "demo",
        "resolution": 64,
        "batch_size": 3,
        "shard_rows": 4,
        "captions": str(place / "captions.json"),
        "text_encoders": ("clip-l-text",),
        "weights": {"clip-l-text": place / "clip"},
        "workers": 0,
    }
    return PreprocessConfig(**{**options, **settings})


def test_each_distinct_caption_is_there_once(place: Path) -> None:
    cache = place / "cache"
    assert read_captions(cache) == TEXTS
    table = np.asarray(zarr.open_group(captions_path(cache), mode="r")["of-image"])
    for row, own in enumerate(CAPTIONS):
        found = [TEXTS[each] for each in table[row] if each >= 0]
        assert found == ([each.strip() for each in own] or [""])
    assert read_record(cache) == {
        "kind": "coco",
        "captions": 9,
        "captions_per_image": None,
        "left_out": 0,
        "images_without": 1,
        "strangers": 1,
    }
    assert verify_cache(cache) == []


def test_columns_are_what_the_encoder_makes_of_the_captions(place: Path) -> None:
    encoder = load_text_encoder(TEXT_ENCODERS["clip-l-text"], folder=place / "clip")
    expected = encoder.encode(TEXTS)
    group = zarr.open_group(captions_path(place / "cache"), mode="r")
    states = np.asarray(group["clip-l-text/states"])[:, 0]
    assert states.dtype == np.float16
    np.testing.assert_allclose(states, expected["states"], atol=3e-3, rtol=1e-3)
    np.testing.assert_array_equal(np.asarray(group["clip-l-text/mask"])[:, 0], expected["mask"])
    provenance = open_manifest(captions_path(place / "cache")).sources["clip-l-text"]
    assert provenance.weights_sha256 == encoder.weights_sha256
    assert provenance.notes["tokenizer_sha256"] == encoder.tokenizer_sha256
    assert provenance.notes["tokens"] == 77
    assert provenance.batch_size == 3
    assert 0 < provenance.notes["deviation"]["relative_rms"] < 1e-3
    assert provenance.notes["deviation"]["captions"] == len(TEXTS)


def test_bytes_depend_neither_on_processes_nor_on_a_kill(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = config(place, cache=tmp_path / "killed")
    write, batches = WriterThread._write_batch, []

    def write_some(self: WriterThread, shards: Any, batch: Any) -> None:
        batches.append(batch)
        if any("clip" in source for source in batch.sources) and batch.rows[0] >= 4:
            raise KeyboardInterrupt
        write(self, shards, batch)

    with monkeypatch.context() as patch:
        patch.setattr(WriterThread, "_write_batch", write_some)
        with pytest.raises(RuntimeError):
            run(killed, QUIET)
    plan = caption_plan(killed)
    assert [source.missing for source in plan.sources] == [(1,)]
    run(killed, QUIET)
    assert folder_contents(killed.cache) == folder_contents(place / "cache")


def test_ranks_of_a_launcher_write_the_same(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = config(place, cache=tmp_path / "both")
    for rank in (1, 0):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        run(both, QUIET)
    assert folder_contents(both.cache) == folder_contents(place / "cache")


def test_jobs_that_share_the_shards_write_the_same(place: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for shards in ("1:2", "0:1"):
        run(config(place, cache=cache, shards=shards), QUIET)
    settle_latent_statistics(cache)
    assert folder_contents(cache) == folder_contents(place / "cache")


@pytest.mark.thorough
def test_two_processes_write_the_same(place: Path, tmp_path: Path) -> None:
    both = config(place, cache=tmp_path / "both", devices=2)
    run(both, QUIET)
    assert folder_contents(both.cache) == folder_contents(place / "cache")


def caption_plan(of: PreprocessConfig) -> Any:
    return make_caption_plan(make_plan(of), of)


def test_another_encoder_is_added_later_and_rewrites_nothing(place: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    images = config(place, cache=cache, captions=None, text_encoders=(), weights={})
    run(images, QUIET)
    run(config(place, cache=cache), QUIET)
    before = folder_contents(cache)
    # the captions are the cache's now
    added = config(
        place,
        cache=cache,
        captions=None,
        text_encoders=("t5-xxl-text",),
        weights={"t5-xxl-text": place / "t5"},
        feature_dtype="int8",
    )
    run(added, QUIET)
    after = folder_contents(cache)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"captions/zarr.json", "captions/zarr.json.copy"}
    group = zarr.open_group(captions_path(cache), mode="r")
    states = np.asarray(group["t5-xxl-text/states"])[:, 0]
    scale = np.asarray(group["t5-xxl-text/states-scale"])[:, 0]
    encoder = load_text_encoder(TEXT_ENCODERS["t5-xxl-text"], folder=place / "t5")
    exact = encoder.encode(TEXTS)["states"]
    assert (np.abs(states * scale[:, None, :] - exact) <= 0.5001 * scale[:, None, :] + 1e-6).all()
    deviation = open_manifest(captions_path(cache)).sources["t5-xxl-text"].notes["deviation"]
    assert 1e-4 < deviation["relative_rms"] < 0.02
    assert not caption_plan(added).rows


def test_the_first_captions_are_kept_and_the_others_counted(place: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cut = config(place, cache=cache, captions_per_image=1)
    run(cut, QUIET)
    assert read_captions(cache) == ["", "a red heart", "a blue star", "a thing of kind"]
    record = read_record(cache)
    assert (record["captions_per_image"], record["left_out"]) == (1, 4)
    with pytest.raises(CacheError) as caught:
        run(config(place, cache=cache), QUIET)
    assert caught.value.field == "--captions"


def test_what_is_there_in_another_way_is_refused_before_anything_is_loaded(place: Path) -> None:
    for settings in ({"feature_dtype": "int8"}, {"compute_dtype": "bfloat16"}, {"batch_size": 2}):
        with pytest.raises(CacheError):
            caption_plan(config(place, cache=place / "cache", **settings))
    with pytest.raises(RepaError) as caught:
        make_plan(config(place, cache=place / "cache", text_encoders=()))
    assert caught.value.field in ("--weights", "--captions")
    # other weights under a name that is complete
    other = place / "other"
    save_clip(other, other, seed=9)
    with pytest.raises(CacheError):
        run(config(place, cache=place / "cache", weights={"clip-l-text": other}), QUIET)


def test_the_command_adds_no_teacher_that_nobody_named(place: Path, tmp_path: Path) -> None:
    flags = {"data": str(place / "images"), "text_encoders": ["clip-l-text"]}
    assert make_config(PreprocessFlags(cache=place / "cache", **flags)).encoders == ()
    assert make_config(PreprocessFlags(cache=tmp_path / "new", **flags)).encoders == ("dinov2-b",)


def test_the_text_of_stable_diffusion_3_on_coco_takes_no_more_than_it_must(
    place: Path, tmp_path: Path
) -> None:
    """COCO train2017, one caption of each of 118,287 images; SoftREPA's own cache of it takes 9.1 TB."""
    count = 118_287
    names = [f"{row:012d}.jpg" for row in range(count)]
    table = tmp_path / "captions.jsonl"
    table.write_text(
        "".join(f'{{"file_name": "{name}", "text": ["caption of {name}", "another"]}}\n' for name in names)
    )
    settings = {"captions": str(table), "captions_per_image": 1, "batch_size": None, "weights": {}}
    text = ("sd3-512-text", "sd3-512-context", "sd3-context")
    asked = config(place, cache=tmp_path / "none", shard_rows=1024, text_encoders=text, **settings)
    plan = make_plan(replace(asked, text_encoders=(), captions=None, captions_per_image=None))
    images: Any = SimpleNamespace(keys=names)
    manifest = replace(plan.manifest, num_rows=count)
    found = make_caption_plan(
        replace(plan, images=images, manifest=manifest, share=range(manifest.num_shards)), asked
    )
    assert found is not None
    assert found.captions.left_out == count
    sizes = {source.source: source.bytes for source in found.sources}
    assert sizes["sd3-512-text"] <= 0.59e12
    assert sizes["sd3-512-context"] <= 0.24e12
    # what the columns hold, and little beside it
    of_a_caption = {"sd3-512-text": 4_829_184, "sd3-512-context": 1_813_504, "sd3-context": 1_027_072}
    for name, each in of_a_caption.items():
        assert 0 < sizes[name] - (count + 1) * each < 1e-4 * sizes[name]
    out = io.StringIO()
    show_captions(found, Console(file=out, width=200))
    for size in sizes.values():
        assert f"{human_bytes(size)} to write" in out.getvalue()
