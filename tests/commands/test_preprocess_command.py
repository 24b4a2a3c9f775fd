"""`repa preprocess` as a user types it: defaults, what is printed, what is computed and what is not."""

from __future__ import annotations

import io
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.commands.cache.upgrade import upgrade
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.errors import RepaError
from repa.data.format.columns import AUTOENCODER, MOMENTS
from repa.data.format.manifest import LATENTS_NOTE
from repa.data.format.opening import open_manifest, read_keys, read_labels
from repa.data.format.survey import committed_shards
from repa.data.reading.reader import CacheReader
from repa.data.testing import folder_contents, synthetic_cache
from repa.data.writing.store import cache_lock, write_manifest
from repa.pipeline import loading
from repa.pipeline.demo.shapes import DemoImages
from repa.pipeline.encoders import load_encoder
from repa.pipeline.encoders.vae import Autoencoder
from repa.pipeline.images.names import default_cache
from repa.pipeline.images.workers import decode_row
from repa.pipeline.run import StoppedError, run
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from repa.pipeline.config import PreprocessConfig

IMAGES, BATCH, SHARD = 21, 4, 8


def demo(cache: Path | None, **changes: Any) -> str:
    """Run the command on a few of the demo's images; returns what it printed."""
    output = io.StringIO()
    arguments: dict[str, Any] = {
        "data": "demo",
        "cache": cache,
        "limit": IMAGES,
        "batch_size": BATCH,
        "shard_rows": SHARD,
    }
    preprocess(PreprocessFlags(**{**arguments, **changes}), console=Console(file=output, width=200))
    return output.getvalue()


def read(cache: Path, columns: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    with CacheReader(cache, columns) as reader:
        rows = reader.valid_rows
        specs = reader.manifest.columns
        out = {name: np.empty((len(rows), *specs[name].shape), specs[name].numpy_dtype) for name in columns}
        reader.read_rows(rows, columns, out)
        return out


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache of the demo's images with float32 features, and what was printed."""
    path = tmp_path_factory.mktemp("demo") / "cache"
    return path, demo(path, feature_dtype="float32")


def batches_of_shards(count: int) -> list[list[int]]:
    return [
        list(range(first, min(first + BATCH, start + SHARD, count)))
        for start in range(0, count, SHARD)
        for first in range(start, min(start + SHARD, count), BATCH)
    ]


def test_columns_are_the_models_on_the_same_batches_bit_for_bit(cached: tuple[Path, str]) -> None:
    """The models called live on one thread, on the batches the design says: restarting at each shard."""
    images = DemoImages(count=IMAGES)
    autoencoder = Autoencoder.load("demo")
    teacher = load_encoder("demo", resolution=64)
    values = read(cached[0], (MOMENTS, "demo/patch", "demo/cls"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows in batches_of_shards(IMAGES):
            pixels = [decode_row(images, row, 64) for row in rows]
            batch = torch.from_numpy(np.stack([each for each in pixels if not isinstance(each, str)]))
            moments, features = autoencoder.encode_moments(batch), teacher.encode(batch)
            np.testing.assert_array_equal(values[MOMENTS][rows], moments.numpy())
            np.testing.assert_array_equal(values["demo/patch"][rows], features["patch"].numpy())
            np.testing.assert_array_equal(values["demo/cls"][rows], features["cls"].numpy())
    finally:
        torch.set_num_threads(threads)


def test_float16_is_the_nearest_to_float32(cached: tuple[Path, str], tmp_path: Path) -> None:
    demo(tmp_path / "half")
    half, full = (read(path, ("demo/patch", "demo/cls")) for path in (tmp_path / "half", cached[0]))
    for column in half:
        np.testing.assert_array_equal(half[column], full[column].astype(np.float16))


def test_rows_keys_and_labels_are_those_of_the_source(cached: tuple[Path, str]) -> None:
    images = DemoImages(count=IMAGES)
    manifest = open_manifest(cached[0])
    assert read_keys(cached[0], manifest) == list(images.keys)
    np.testing.assert_array_equal(read_labels(cached[0], manifest), images.labels)
    assert manifest.class_names == tuple(images.class_names)
    assert manifest.resolution == 64
    assert manifest.shard_rows == SHARD
    assert manifest.sources["sd-vae"].notes["location"] == "demo"
    assert manifest.sources["demo"].batch_size == BATCH


def test_what_is_printed(cached: tuple[Path, str]) -> None:
    path, printed = cached
    for part in (
        "images  demo: 21 in 10 classes",
        f"cache   {path}: 3 shards of 8 images at 64×64",
        "patch float32[64,128]",
        f"free on the disk of {path}: fits",
        f"wrote 21 images to {path}",
        "demo/patch: 21 images, 688 kB, 32768 bytes each",
        "sd-vae/moments: 21 images, 43 kB, 2048 bytes each",
        "time: loading models",
        "device idle",
    ):
        assert part in printed


def no_models(*arguments: object) -> list[Any]:
    raise AssertionError(f"models were loaded: {arguments}")


def test_a_complete_cache_needs_no_model(cached: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_models", no_models)
    before = folder_contents(cached[0])
    assert "is complete: nothing to do" in demo(cached[0], feature_dtype="float32")
    assert folder_contents(cached[0]) == before
    # what is written is measured
    assert open_manifest(cached[0]).sources[AUTOENCODER].notes[LATENTS_NOTE]["images"] == 21


@pytest.mark.parametrize("from_before", [False, True])
def test_a_kill_before_the_latents_were_measured_leaves_nothing_out(
    from_before: bool, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    demo(cache, encoders=["none"], limit=3)
    undisturbed = folder_contents(cache)
    manifest = open_manifest(cache)
    latents = manifest.sources[AUTOENCODER]
    notes = {name: value for name, value in latents.notes.items() if name != LATENTS_NOTE}
    # what an earlier version wrote does not name repa among the libraries, and stays as it is
    names = {name: value for name, value in latents.libraries.items() if not (from_before and name == "repa")}
    bare = replace(latents, notes=notes, libraries=names)
    with cache_lock(cache) as seen:
        write_manifest(cache, replace(manifest, sources={**manifest.sources, AUTOENCODER: bare}), seen)
    killed = folder_contents(cache)
    assert "is complete: nothing to do" in demo(cache, encoders=["none"], limit=3)
    assert folder_contents(cache) == (killed if from_before else undisturbed)


def test_upgrade_measures_the_latents_of_a_cache_from_before(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=12)
    printed = []
    for _ in range(2):
        console = Console(file=io.StringIO())
        upgrade(cache=tmp_path / "cache", console=console)
        printed.append(console.file.getvalue())
    assert ["measured" in each for each in printed] == [True, False]
    assert open_manifest(tmp_path / "cache").sources[AUTOENCODER].notes[LATENTS_NOTE]["images"] == 12


def test_a_dry_run_plans_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_models", no_models)
    printed = demo(tmp_path / "cache", dry_run=True)
    assert "21 images" in printed
    assert "fits" in printed
    assert not (tmp_path / "cache").exists()


def test_an_encoder_added_later_rewrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    demo(cache, encoders=["none"])
    assert list(open_manifest(cache).sources) == ["sd-vae"]
    groups = {cache / "zarr.json", cache / "zarr.json.copy"}
    files = [file for file in cache.rglob("*") if file.is_file() and file not in groups]
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files if file.stat().st_size}
    loaded = []
    real = loading.load_models

    def load_models(config: PreprocessConfig, sources: Sequence[str], device: str) -> list[Any]:
        loaded.extend(sources)
        return real(config, sources, device)

    monkeypatch.setattr(loading, "load_models", load_models)
    demo(cache, encoders=["demo"], vae=None, batch_size=None, shard_rows=None)
    assert loaded == ["demo"]
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before
    demo(tmp_path / "at-once")
    assert folder_contents(cache) == folder_contents(tmp_path / "at-once")


def test_only_the_missing_shards_of_each_source_are_written(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    demo(cache)
    whole = folder_contents(cache)
    (cache / "commits" / "sd-vae" / "0.json").unlink()
    (cache / "commits" / "demo" / "2.json").unlink()
    kept = cache / "demo" / "patch" / "c" / "1"
    stamp = max(file.stat().st_mtime_ns for file in kept.rglob("*"))
    printed = demo(cache)
    assert "wrote 13 images" in printed
    assert "sd-vae/moments: 8 images" in printed
    assert "demo/patch: 5 images" in printed
    assert max(file.stat().st_mtime_ns for file in kept.rglob("*")) == stamp
    assert folder_contents(cache) == whole


def test_random_weights_are_warned_of_and_recorded(tmp_path: Path) -> None:
    printed = demo(
        tmp_path / "cache", encoders=["dinov2-s"], vae="demo", random_weights=True, limit=2, resolution=16
    )
    assert "WARNING: --random-weights: dinov2-s will hold the output of untrained networks" in printed
    sources = open_manifest(tmp_path / "cache").sources
    assert sources["dinov2-s"].random_weights
    assert not sources["sd-vae"].random_weights
    with pytest.raises(RepaError, match="--random-weights True, not False"):
        demo(tmp_path / "cache", encoders=["dinov2-s"], limit=2, resolution=16)


def test_the_readmes_commands_find_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo(None, limit=2, encoders=["none"])
    assert default_cache() == Path("caches/demo")


def test_ranks_of_a_launcher_share_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    for rank in (1, 0):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        printed = demo(cache)
        done = committed_shards(cache, open_manifest(cache), "demo")
        assert done == ([1] if rank == 1 else [0, 1, 2])
        assert ("images  demo" in printed) == (rank == 0)
        assert f"(process {rank} of 2; the others write the rest)" in printed
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    demo(tmp_path / "alone")
    assert folder_contents(cache) == folder_contents(tmp_path / "alone")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_says_what_is_saved(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third shard: two are saved, the rest is as if it had never begun."""
    cache = tmp_path / "cache"
    real = DemoImages.load

    def load(self: DemoImages, index: int) -> Any:
        if index == 2 * SHARD + 2:
            deadline = time.monotonic() + 600
            while len(list(cache.glob("commits/*/*.json"))) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), number)
        return real(self, index)

    left: list[str] = []

    def leave(message: str) -> None:
        left.append(message)
        raise SystemExit(130)

    before = signal.getsignal(number)
    monkeypatch.setattr("repa.commands.preprocess._leave", leave)
    with monkeypatch.context() as patch:
        patch.setattr(DemoImages, "load", load)
        with pytest.raises(SystemExit):
            demo(cache)
    assert left == [
        f"interrupted: 16 of 21 images of sd-vae, 16 of 21 images of demo are saved in {cache}; "
        "the same command resumes"
    ]
    assert signal.getsignal(number) == before
    assert not list(cache.rglob("*.partial"))
    printed = demo(cache)
    assert "2 of 3 shards" in printed
    assert "wrote 5 images" in printed


def test_decoding_processes_give_the_same_bytes(tmp_path: Path, cached: tuple[Path, str]) -> None:
    demo(tmp_path / "cache", feature_dtype="float32", workers=1)
    assert folder_contents(tmp_path / "cache") == folder_contents(cached[0])


def test_one_image_is_said_in_the_singular(tmp_path: Path) -> None:
    printed = demo(tmp_path / "cache", limit=1, shard_rows=1)
    assert "images  demo: 1 in 10 classes\n" in printed
    assert f"cache   {tmp_path}/cache: 1 shard of 1 image at 64×64" in printed
    assert f"wrote 1 image to {tmp_path}/cache in " in printed
    assert "  sd-vae/moments: 1 image, " in printed
    assert not re.findall(r"\b(?<![\d.,])1 (?:images|shards|classes|rows)\b", printed)


def test_stopped_is_no_mistake_of_the_user() -> None:
    assert not issubclass(StoppedError, RepaError)
    assert callable(run)
