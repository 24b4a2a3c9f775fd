"""What is left to do: sources, shards, bytes, and what is taken over from a cache that is there."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from repa.data.errors import RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.format.layout import shard_file
from repa.data.machine import usable_cores
from repa.pipeline.config import PreprocessConfig
from repa.pipeline.encoders.vae import DEFAULT_VAE
from repa.pipeline.plan import Plan, make_plan
from repa.pipeline.run import saved, share_out
from repa.pipeline.shard_loop.ranks import Rank


def config(tmp_path: Path, **changes: Any) -> PreprocessConfig:
    given = PreprocessConfig(
        data="demo",
        cache=tmp_path / "cache",
        encoders=("demo",),
        vae="demo",
        resolution=64,
        limit=2500,
        batch_size=4,
    )
    return replace(given, **changes)


def on_pictures(data: Path, cache: Path, **changes: Any) -> Plan:
    """The plan of the command that made `complete_cache`."""
    given = PreprocessConfig(data=str(data), cache=cache, encoders=("demo",), resolution=16)
    return make_plan(replace(given, **changes))


def test_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    plan = make_plan(config(tmp_path))
    assert [source.source for source in plan.sources] == ["sd-vae", "demo"]
    assert plan.manifest.num_shards == 3
    assert plan.rows == 2500
    autoencoder, teacher = plan.sources
    index = 1024 * 16 + 4
    assert autoencoder.bytes == 2500 * (8 * 8 * 8 * 4 + 4) + 3 * index
    assert teacher.bytes == 2500 * (64 * 128 * 2 + 4) + 2500 * (128 * 2 + 4) + 6 * index
    assert plan.bytes == autoencoder.bytes + teacher.bytes
    assert plan.fits
    assert not (tmp_path / "cache").exists()


def test_bytes_agree_with_a_cache(pictures: Path, complete_cache: Path, tmp_path: Path) -> None:
    plan = on_pictures(pictures, tmp_path / "new", vae="demo", shard_rows=4)
    written = sum(
        shard_file(complete_cache, name, spec, shard).stat().st_size
        for source in plan.sources
        for name, spec in source.columns.items()
        for shard in range(3)
    )
    assert plan.bytes == written


def test_full_size_columns_need_no_weights(tmp_path: Path) -> None:
    plan = make_plan(
        config(tmp_path, encoders=("dinov2-b", "mae-l"), vae=None, data="demo", resolution=256, limit=10)
    )
    # on the demo's images at a foreign resolution, the demo's autoencoder
    assert plan.sources[0].columns == {MOMENTS: ColumnSpec(shape=(8, 32, 32), dtype="float32")}
    assert plan.sources[1].columns == {
        "dinov2-b/patch": ColumnSpec(shape=(256, 768), dtype="float16"),
        "dinov2-b/cls": ColumnSpec(shape=(768,), dtype="float16"),
    }
    assert plan.sources[2].columns["mae-l/patch"].shape == (256, 1024)


def test_defaults_of_a_new_cache(pictures: Path, tmp_path: Path) -> None:
    plan = make_plan(PreprocessConfig(data=str(pictures), cache=tmp_path / "new", encoders=("dinov2-s",)))
    assert plan.config.vae == DEFAULT_VAE
    assert plan.config.shard_rows == 1024
    assert plan.sources[0].columns[MOMENTS].shape == (8, 32, 32)
    assert not any(source.drawn for source in plan.sources)
    drawn = make_plan(replace(plan.config, random_weights=True))
    assert all(source.drawn for source in drawn.sources)


def test_what_is_left_open_is_taken_over_from_the_cache(pictures: Path, complete_cache: Path) -> None:
    plan = on_pictures(pictures, complete_cache)
    assert plan.config.vae == "demo"
    assert plan.config.batch_size == 1
    assert plan.config.shard_rows == 4
    assert plan.rows == 0
    assert plan.bytes == 0
    assert all(source.missing == () and source.declared is not None for source in plan.sources)


def test_only_what_is_missing_is_planned(pictures: Path, complete_cache: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(complete_cache, tmp_path / "copy"))
    (cache / "commits" / "demo" / "1.json").unlink()
    (cache / "commits" / "sd-vae" / "2.json").unlink()
    autoencoder, teacher = on_pictures(pictures, cache).sources
    assert autoencoder.missing == (2,)
    assert teacher.missing == (1,)
    plan = on_pictures(pictures, cache)
    assert plan.rows == 8
    assert plan.bytes == autoencoder.bytes + teacher.bytes
    assert saved(plan) == (
        f"interrupted: 8 of 12 images of sd-vae, 8 of 12 images of demo are saved in {cache}; "
        "the same command resumes"
    )


def test_a_complete_autoencoder_is_not_asked_how_it_was_made(
    pictures: Path, complete_cache: Path, tmp_path: Path
) -> None:
    # its folder may be gone, its batch another: an encoder is added all the same
    plan = on_pictures(pictures, complete_cache, encoders=("siglip2-b",), batch_size=3, vae="/nowhere")
    assert plan.sources[0].missing == ()
    assert plan.sources[1].missing == (0, 1, 2)


def test_shares_of_devices(tmp_path: Path) -> None:
    plan = make_plan(config(tmp_path, devices=3))
    jobs = share_out(plan, Rank())
    assert [(job.rank, job.world) for job in jobs] == [(0, 3), (1, 3), (2, 3)]
    assert {job.threads for job in jobs} == {max(1, usable_cores() // 3)}
    one = share_out(make_plan(config(tmp_path)), Rank(rank=5, world=8, local_rank=1, local_world=4))
    assert [(job.rank, job.world) for job in one] == [(5, 8)]


def test_more_devices_than_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [job.device for job in share_out(make_plan(config(tmp_path, devices=2)), Rank())] == [
        "cuda:0",
        "cuda:1",
    ]
    with pytest.raises(RepaError) as caught:
        share_out(make_plan(config(tmp_path, devices=3)), Rank())
    assert caught.value.field == "--devices"
    with pytest.raises(RepaError) as caught:
        share_out(make_plan(config(tmp_path)), Rank(rank=2, world=4, local_rank=2, local_world=4))
    assert caught.value.field == "--devices"


def test_more_processes_than_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repa.pipeline.shard_loop.devices.usable_cores", lambda: 1)
    # three shards: a fourth process would have nothing to do
    jobs = share_out(make_plan(config(tmp_path, devices=4)), Rank())
    assert [(job.rank, job.world) for job in jobs] == [(0, 4), (1, 4), (2, 4)]
    with pytest.raises(RepaError) as caught:
        share_out(make_plan(config(tmp_path, devices=5)), Rank())
    assert caught.value.field == "--devices"
