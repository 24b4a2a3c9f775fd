"""Captions are checked, mended, dropped and joined with their cache, and never lost in silence."""

from __future__ import annotations

import io
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import repa
from captioned_images import CAPTIONS, TEXTS, save_coco, save_images
from repa.commands.cache.export import export
from repa.commands.cache.info import info
from repa.commands.cache.merge import merge
from repa.commands.cache.reencoding import verify_by_reencoding
from repa.commands.cache.repair import repair
from repa.data.errors import CacheError
from repa.data.format.captions import captions_path, read_captions
from repa.data.format.layout import shard_file
from repa.data.format.opening import open_manifest
from repa.data.testing import folder_contents
from repa.data.upkeep.drop import drop_source
from repa.data.upkeep.seal import seal_cache
from repa.data.upkeep.verify import verify_cache
from repa.pipeline.config import PreprocessConfig
from repa.pipeline.run import run
from repa.pipeline.text.encoder import TextEncoder
from rich.console import Console
from tiny_text import save_clip, save_t5

if TYPE_CHECKING:
    from pathlib import Path

QUIET = Console(quiet=True)
STATES = "clip-l-text/states"


def write(place: Path, images: Path, file: Path, cache: Path, **settings: Any) -> None:
    options: dict[str, Any] = {
        "data": str(images),
        "cache": cache,
        "encoders": (),
        "vae": "demo",
        "resolution": 64,
        "batch_size": 3,
        "shard_rows": 4,
        "captions": str(file),
        "text_encoders": ("clip-l-text", "t5-xxl-text"),
        "weights": {"clip-l-text": place / "clip", "t5-xxl-text": place / "t5"},
        "feature_dtype": "int8",
        "workers": 0,
    }
    run(PreprocessConfig(**{**options, **settings}), QUIET)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upkeep")
    save_images(path / "images")
    save_coco(path / "captions.json")
    save_clip(path / "clip", path / "clip", seed=1)
    save_t5(path / "t5", path / "t5", seed=3)
    write(path, path / "images", path / "captions.json", path / "cache")
    return path


@pytest.fixture
def cache(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "cache", tmp_path / "cache")


def test_what_is_damaged_is_encoded_again_to_the_byte(place: Path, cache: Path) -> None:
    where = captions_path(cache)
    sound = folder_contents(place / "cache")
    columns = open_manifest(where).columns
    shards = [
        shard_file(where, STATES, columns[STATES], 1),
        shard_file(where, "t5-xxl-text/mask", columns["t5-xxl-text/mask"], 0),
    ]
    for file in (*shards, where / "zarr.json", where / "label" / "c" / "0", where / "valid" / "c" / "0"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    (where / "commits" / "clip-l-text" / "0.json").unlink()
    repair(cache=cache, data=str(place / "images"), console=QUIET)
    assert folder_contents(cache) == sound


def test_captions_that_are_damaged_are_written_again_from_their_file(place: Path, cache: Path) -> None:
    where = captions_path(cache)
    for name in ("keys.txt", "of-image/c/0/0", "of-image/zarr.json"):
        file = where / name
        file.write_bytes(file.read_bytes()[:-3] + b"xyz")
    assert len(verify_cache(cache)) == 2
    write(place, place / "images", place / "captions.json", cache)
    assert folder_contents(cache) == folder_contents(place / "cache")


def test_other_files_of_an_encoder_are_told_before_anything_is_withdrawn(
    place: Path, cache: Path, tmp_path: Path
) -> None:
    save_clip(tmp_path / "clip", tmp_path / "clip", seed=5)
    where = captions_path(cache)
    file = shard_file(where, STATES, open_manifest(where).columns[STATES], 0)
    file.write_bytes(file.read_bytes()[:-1])
    before = folder_contents(cache)
    with pytest.raises(CacheError) as caught:
        repair(
            cache=cache,
            data=str(place / "images"),
            weights=[f"clip-l-text={tmp_path / 'clip'}"],
            console=QUIET,
        )
    assert caught.value.field == "--weights"
    assert folder_contents(cache) == before


def test_captions_encoded_again_are_those_that_are_stored(
    place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    verify_by_reencoding(
        cache=cache, rows=5, data=str(place / "images"), console=Console(file=out, width=200)
    )
    lines = [line.split() for line in out.getvalue().splitlines() if "text/" in line]
    assert {line[0] for line in lines} == {
        STATES,
        "clip-l-text/pooled",
        "clip-l-text/mask",
        "t5-xxl-text/states",
        "t5-xxl-text/mask",
    }
    assert all(line[1:3] == ["5", "5"] for line in lines)
    features = TextEncoder.features

    def other(self: TextEncoder, tokens: Any) -> Any:
        found = features(self, tokens)
        return {**found, "states": found["states"] + 0.5}

    monkeypatch.setattr(TextEncoder, "features", other)
    with pytest.raises(SystemExit) as caught:
        verify_by_reencoding(cache=cache, rows=2, data=str(place / "images"), console=QUIET)
    assert caught.value.code == 1


def test_a_text_encoder_is_dropped_alone(cache: Path) -> None:
    drop_source(cache, "t5-xxl-text")
    assert list(open_manifest(captions_path(cache)).sources) == ["clip-l-text"]
    assert verify_cache(cache) == []
    assert read_captions(cache) == TEXTS
    with pytest.raises(CacheError) as caught:
        drop_source(cache, "t5-xxl-text")
    assert caught.value.field == "SOURCE"


def test_a_cache_whose_captions_lack_shards_is_not_sealed(cache: Path) -> None:
    seal_cache(cache)
    (captions_path(cache) / "commits" / "t5-xxl-text" / "1.json").unlink()
    with pytest.raises(CacheError) as caught:
        seal_cache(cache)
    assert caught.value.field == "t5-xxl-text"


def test_info_tells_of_the_captions(cache: Path) -> None:
    out = io.StringIO()
    info(cache=cache, as_json=True, console=Console(file=out))
    found = json.loads(out.getvalue())["captions"]
    assert found["num_rows"] == len(TEXTS)
    assert found["record"]["images_without"] == 1
    assert found["sources"]["clip-l-text"]["notes"]["layer"] == "last"
    assert found["columns"][STATES]["dtype"] == "int8"
    info(cache=cache, console=Console(file=out, width=200))
    assert "tokenizer" in out.getvalue()


def test_parts_are_joined_with_their_captions(place: Path, tmp_path: Path) -> None:
    halves = (range(0, 3), range(3, 6))
    for number, rows in enumerate(halves):
        images = tmp_path / f"images{number}"
        images.mkdir()
        for row in rows:
            name = f"picture_{row:03d}.png"
            shutil.copy(place / "images" / name, images / name)
        write(place, images, place / "captions.json", tmp_path / f"part{number}", labels="none")
    parts = [tmp_path / f"part{number}" for number in range(2)]
    merge(parts=parts, cache=tmp_path / "whole", console=QUIET)
    assert verify_cache(tmp_path / "whole") == []
    whole, once = repa.open(tmp_path / "whole"), repa.open(place / "cache")
    assert whole.captions.texts == once.captions.texts == TEXTS
    rows = range(len(TEXTS))
    for column in whole.captions.cache.columns:
        np.testing.assert_allclose(
            whole.captions.read(rows, column)[column].astype(float),
            once.captions.read(rows, column)[column].astype(float),
            atol=1,
            rtol=1e-2,
        )
    # one without captions is not joined in silence
    bare = tmp_path / "bare"
    write(
        place,
        tmp_path / "images1",
        place / "captions.json",
        bare,
        labels="none",
        captions=None,
        text_encoders=(),
        weights={},
    )
    with pytest.raises(CacheError) as caught:
        merge(parts=[parts[0], bare], cache=tmp_path / "half", console=QUIET)
    assert caught.value.field == "--source"
    assert not (tmp_path / "half").exists()
    merge(parts=[parts[0], bare], cache=tmp_path / "half", sources=["sd-vae"], console=QUIET)
    assert not captions_path(tmp_path / "half").exists()


def test_an_export_does_not_leave_captions_out_in_silence(cache: Path, tmp_path: Path) -> None:
    for columns in (None, STATES):
        with pytest.raises(CacheError) as caught:
            export(out=tmp_path / "out", cache=cache, columns=columns, console=QUIET)
        assert caught.value.field == "--columns"
    export(out=tmp_path / "out", cache=cache, columns="sd-vae/moments", console=QUIET)


def test_captions_are_read_through_the_front_door(cache: Path) -> None:
    opened = repa.open(cache)
    captions = opened.captions
    assert len(captions) == len(TEXTS)
    assert captions.of(0) == CAPTIONS[0]
    assert captions.of(2) == [""]
    states = captions.read([3, 0], STATES)[STATES]
    assert states.shape == (2, 77, 16)
    np.testing.assert_array_equal(states[0], captions.cache[3][STATES])
    # by image, of its first caption, beside the columns of images
    both = opened.read([1], STATES, "sd-vae/moments")
    np.testing.assert_array_equal(both[STATES][0], captions.read([3], STATES)[STATES][0])
    batch = next(iter(opened.loader(STATES, batch_size=2, seed=1)))
    assert opened.target(batch, STATES).shape == (2, 77, 16)
    drop = cache.parent / "images"
    shutil.copytree(cache, drop, ignore=shutil.ignore_patterns("captions"))
    with pytest.raises(CacheError) as caught:
        _ = repa.open(drop).captions
    assert caught.value.field == "captions"
