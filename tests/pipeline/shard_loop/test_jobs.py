"""Several jobs on one cache: tasks of an array at once, ranges in turn, ranks within a share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import AUTOENCODER
from repa.data.format.manifest import LATENTS_NOTE
from repa.data.format.opening import open_manifest
from repa.data.format.survey import committed_shards
from repa.data.testing import folder_contents
from repa.data.upkeep.seal import seal_cache

Command = Callable[..., str]
JOB = "import sys; from repa.cli import main; sys.exit(main(sys.argv[1:]))"


def array(number: int, count: int) -> dict[str, str]:
    """The variables of a task of `sbatch --array=0-{count - 1}`."""
    values = {"ID": number, "MIN": 0, "MAX": count - 1, "COUNT": count, "STEP": 1}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def test_tasks_of_an_array_at_once(pictures: Path, complete_cache: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    words = [
        *("preprocess", "--data", str(pictures), "--cache", str(cache), "--encoder", "demo", "--vae", "demo"),
        *("--resolution", "16", "--batch-size", "1", "--shard-rows", "4", "--shards", "auto"),
    ]
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, *words],
            env={**os.environ, **array(number, 2)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    said = [task.communicate(timeout=600)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    # whichever ended last has measured the latents
    assert folder_contents(cache) == folder_contents(complete_cache)
    seal_cache(cache)
    assert folder_contents(cache) == folder_contents(complete_cache)


def test_ranges_one_after_the_other(command: Command, complete_cache: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command(shards="1:3")
    manifest = open_manifest(cache)
    assert committed_shards(cache, manifest, "demo") == [1, 2]
    with pytest.raises(CacheError) as caught:
        seal_cache(cache)
    assert caught.value.field == AUTOENCODER
    before = folder_contents(cache)
    command(shards="1:3")
    assert folder_contents(cache) == before
    command(shards=":1", devices=1)
    assert folder_contents(cache) == folder_contents(complete_cache)


def test_ranks_share_the_share(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        **array(0, 1),
    }.items():
        monkeypatch.setenv(name, value)
    command(shards="auto")
    assert committed_shards(tmp_path / "cache", open_manifest(tmp_path / "cache"), "demo") == [1]
    for name, value in array(1, 2).items():
        monkeypatch.setenv(name, value)
    # shard 1 alone is this task's, and the first of its processes takes it
    command(shards="auto")
    assert committed_shards(tmp_path / "cache", open_manifest(tmp_path / "cache"), "demo") == [1]


def test_shares_that_cannot_be(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    for asked in ("auto", "3:4", "2:1"):
        with pytest.raises(RepaError) as caught:
            command(shards=asked)
        assert caught.value.field == "--shards"
    assert not (tmp_path / "cache").exists()


def test_seal_measures_what_no_job_has(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr("repa.pipeline.run.settle_latent_statistics", lambda path: False)
        command()
    assert LATENTS_NOTE not in open_manifest(cache).sources[AUTOENCODER].notes
    sealed = seal_cache(cache)
    assert sealed.latents is not None
    assert sealed.latents["images"] == sealed.info.valid_rows == 12
    once = folder_contents(cache)
    assert seal_cache(cache).latents == sealed.latents
    assert folder_contents(cache) == once
