"""What `repa plan` says is computed from what it measured, and it leaves nothing behind."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repa.cli import run_command
from repa.commands.measure.disk import DiskSpeed, measure_disk
from repa.commands.plan import PlanFlags, break_even, plan, training_bytes
from repa.commands.preprocess import EncodingFlags, PreprocessFlags, make_config, preprocess
from repa.data.errors import RepaError
from repa.data.machine import usable_cores
from repa.pipeline.estimate import EncodingSpeed, live_models
from repa.pipeline.plan import make_plan
from repa.pipeline.shard_loop.devices import MAX_LANES
from rich.console import Console

SIDE, ROWS = 16, 6


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    for number in range(ROWS):
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(
            folder / "a" / f"{number}.png"
        )
    (folder / "a" / "2.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def flags(pictures: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "data": str(pictures),
        "cache": tmp_path / "caches" / "cache",
        "encoders": ["demo"],
        "vae": "demo",
        "resolution": SIDE,
        "batch_size": 2,
        "shard_rows": 4,
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts figures in the place of what is measured."""

    def put(*, read: float = 1e6, write: float = 1e9, beside: bool = False) -> None:
        disk = DiskSpeed(bytes=1000, write=write, read=read)
        speed = EncodingSpeed(
            images=8,
            views=1,
            model_seconds={"sd-vae": 0.5, "demo": 0.25},
            decode_seconds=0.125,
            load_seconds=3.0,
            decoders=1,
            beside=beside,
            devices=1,
        )
        monkeypatch.setattr("repa.commands.measure.disk.measure_disk", lambda folder, row_bytes: disk)
        monkeypatch.setattr("repa.pipeline.estimate.measure_encoding", lambda found: speed)

    return put


def said(flags: dict[str, Any], **more: Any) -> str:
    output = io.StringIO()
    plan(PlanFlags(**flags, **more), console=Console(file=output, width=300))
    return output.getvalue()


def test_the_break_even_solves_its_equation() -> None:
    found = break_even(1000, encode_seconds=0.005, live_seconds=0.004, read_seconds=0.001)
    assert found.images == pytest.approx(5000 / 3)
    # at that many training images both have taken the same time
    assert 1000 * 0.005 + found.images * 0.001 == pytest.approx(found.images * 0.004)
    assert break_even(1000, encode_seconds=1, live_seconds=0.001, read_seconds=0.001).images is None
    assert break_even(1000, encode_seconds=1, live_seconds=0.001, read_seconds=0.002).images is None


@pytest.mark.parametrize(("step", "cached"), [(0.01, 0.01), (0.003, 0.003), (0.0005, 0.001)])
def test_reading_counts_where_no_step_hides_it(step: float, cached: float) -> None:
    found = break_even(
        1000, encode_seconds=0.004, live_seconds=0.004, read_seconds=0.001, step_seconds=step
    ).images
    assert found is not None
    assert 1000 * 0.004 + found * cached == pytest.approx(found * (step + 0.004))


def test_an_image_reads_all_but_the_class_vector(flags: dict[str, Any]) -> None:
    moments, patch = 8 * 2 * 2 * 4, 4 * 128
    assert training_bytes(make_plan(make_config(EncodingFlags(**flags)))) == moments + 2 * patch
    as_int8 = make_plan(make_config(EncodingFlags(**flags, feature_dtype="int8")))
    assert training_bytes(as_int8) == moments + patch + 4 * 128
    attention = make_plan(make_config(EncodingFlags(**flags, attention="2,3")))
    queries = next(
        spec for source in attention.sources for name, spec in source.columns.items() if name == "demo/q"
    )
    assert training_bytes(attention) == moments + 2 * patch + 2 * queries.row_bytes


def test_seconds_add_up_or_run_side_by_side() -> None:
    def speed(**changes: Any) -> EncodingSpeed:
        given: dict[str, Any] = {
            "images": 1,
            "views": 1,
            "model_seconds": {"sd-vae": 0.5, "demo": 0.25},
            "decode_seconds": 2.0,
            "load_seconds": 1.0,
            "decoders": 4,
            "beside": False,
            "devices": 1,
        }
        return EncodingSpeed(**{**given, **changes})

    assert speed().seconds_of(["demo"]) == 0.25 + 0.5
    assert speed(devices=2).rate == 2 / (0.75 + 0.5)
    assert speed(beside=True).seconds_of(["demo"]) == 0.5
    assert speed(beside=True).seconds_of(["sd-vae", "demo"]) == 0.75
    # an image of the set is decoded once and encoded in each view; a training image has one
    assert speed(views=2).rate == 1 / (2 * 0.75 + 0.5)
    assert speed(views=2).seconds_of(["demo"]) == 0.25 + 0.5


def test_what_is_said_follows_from_what_was_measured(
    flags: dict[str, Any], measured: Callable[..., None]
) -> None:
    measured(read=1152e3)
    lines = said(flags, images_per_second=100)
    # 0.5 + 0.25 + 0.125 s an image, six images
    assert "1.14 images/s, measured on 8 images: sd-vae 500 ms, demo 250 ms, decoding 125 ms each" in lines
    assert "time    5.2 s for 6 images, and 3.0 s to load the models" in lines
    # 128 + 1024 bytes an image
    assert (
        "an image reads 1.15 kB: 100.0 images/s (given) need 115 kB/s; this disk gives 10 times that" in lines
    )
    # encoded in 0.375 s, for the disk takes 1,280 bytes sooner; a step of 0.01 s hides the reading
    assert "pays    for itself after 6 training images, 1.00 passes over the set" in lines
    assert (
        "demo: 375 ms of every training image live, decoding included, or 375 ms of each image of the set "
        "once; rows are read in 1 ms, beside a step of 10 ms; latents come from the cache either way" in lines
    )
    # without a step 0.375 s are saved but for the 0.001 s of reading: 6 · 0.375 / 0.374
    assert "pays    for itself after 6 training images" in (unknown := said(flags))
    assert "rows are read in 1 ms, which no known step hides" in unknown
    assert "images  " in lines
    assert re.search(r"moments float32\[8,2,2\] 768 B", lines)
    assert "free on the disk" in lines


def test_a_slow_disk_is_said(flags: dict[str, Any], measured: Callable[..., None]) -> None:
    measured(read=1152.0, write=10.0)
    lines = said(flags, images_per_second=4)
    assert "this disk gives 25% of it: take a faster one, or a cache that fits into memory" in lines
    assert "the disk is slower than the models" in lines
    assert "this disk gives 10,000 times that" in said(flags, images_per_second=1e-4)
    # 1,280 bytes of tokens and class vector at 10 a second; a second of reading is more than 0.25 + 0.375
    assert "pays    never" in lines
    assert "or 128 s of each image of the set once; rows are read in 1 s, beside a step of 250 ms" in lines
    assert "this disk feeds 1.00 images/s; name the --model" in said(flags)


def test_nothing_is_left_behind_and_everything_is_measured(
    flags: dict[str, Any], tmp_path: Path, pictures: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    lines = said(
        {**flags, "feature_dtype": "int8", "attention": "2,3", "attention_rank": 8},
        model="SiT-T/1",
        train_batch_size=2,
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert re.search(
        r"encode  [\d.,]+ images/s, measured on \d+ images: sd-vae [\d.]+ m?s, demo [\d.]+ m?s, decoding",
        lines,
    )
    assert re.search(
        r"images/s \(measured, plain SiT-T/1, batch 2[^)]*\) need [\d.]+ [kMG]?B/s; this disk gives", lines
    )
    assert re.search(r"disk    [\d.]+ MB in .*: written at [\d.]+ [kMG]?B/s, read in random rows", lines)


def test_where_a_batch_takes_long_fewer_images_are_measured(
    flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repa.pipeline.estimate._TIMED_SECONDS", 0.0)
    monkeypatch.setattr("repa.commands.plan._STEP_SECONDS", 0.0)
    lanes = min(MAX_LANES, usable_cores())
    lines = said({**flags, "batch_size": 64}, model="SiT-T/1", train_batch_size=16)
    assert f"measured on {2 * lanes if lanes > 1 else 4} images:" in lines
    assert "(measured, plain SiT-T/1, batch 16, 1 of its images timed) need" in lines


def test_a_complete_cache_has_nothing_to_do_and_still_a_price(flags: dict[str, Any]) -> None:
    preprocess(PreprocessFlags(**flags), console=Console(file=io.StringIO()))
    times = {file: file.stat().st_mtime_ns for file in flags["cache"].rglob("*")}
    lines = said(flags)
    assert "time    none: every column is there" in lines
    assert "pays    " in lines
    assert {file: file.stat().st_mtime_ns for file in flags["cache"].rglob("*")} == times
    found = make_plan(make_config(EncodingFlags(**flags)))
    speed = EncodingSpeed(
        images=1,
        views=1,
        model_seconds={"demo": 1.0},
        decode_seconds=0.0,
        load_seconds=0.0,
        decoders=1,
        beside=False,
        devices=1,
    )
    assert live_models(found, speed) == ("demo",)


def test_latents_alone_have_no_teacher_to_pay_for(
    flags: dict[str, Any], measured: Callable[..., None]
) -> None:
    measured()
    assert "pays" not in said({**flags, "encoders": ["none"]})


def test_the_flags_are_those_of_preprocess(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PlanFlags] = []
    monkeypatch.setattr("repa.cli.plan", asked.append)
    words = ("--data", flags["data"], "--encoder", "demo", "--vae", "demo", "--resolution", "16", "--exif")
    more = ("--weights", "demo=file", "--images-per-second", "7.5", "--train-batch-size", "3")
    run_command(("plan", *words, *more, "--model", "SiT-S/2"))
    shared = {"data": flags["data"], "encoders": ["demo"], "vae": "demo", "resolution": 16}
    shared |= {"apply_exif": True, "weights": ["demo=file"]}
    assert asked == [PlanFlags(**shared, images_per_second=7.5, train_batch_size=3, model="SiT-S/2")]
    assert make_config(asked[0]) == make_config(PreprocessFlags(**shared))


def test_figures_that_are_none_are_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(RepaError, match="--images-per-second 0 is too small"):
        said(flags, images_per_second=0)
    with pytest.raises(RepaError, match="--train-batch-size -1 is too small"):
        said(flags, train_batch_size=-1)
    with pytest.raises(RepaError, match=r"image folder .* does not exist"):
        said({**flags, "data": "nowhere"})


def test_the_scratch_file_is_whole_read_once_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, int]] = []
    preadv = os.preadv

    def log(descriptor: int, buffers: list[bytearray], offset: int) -> int:
        reads.append((offset, len(buffers[0])))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", log)
    found = measure_disk(tmp_path, row_bytes=300_000, scratch_bytes=9_000_000)
    assert found is not None
    assert found.bytes == 8_000_000
    assert math.isfinite(found.write)
    assert math.isfinite(found.read)
    assert sorted(reads) == [(start, 300_000) for start in range(0, 26 * 300_000, 300_000)]
    assert [start for start, _ in reads] != sorted(start for start, _ in reads)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert measure_disk(tmp_path, row_bytes=1000) is None
    monkeypatch.undo()

    def refuse(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(RepaError, match="No space left on device; free some space"):
            measure_disk(tmp_path, row_bytes=1000)
    assert list(tmp_path.iterdir()) == []
