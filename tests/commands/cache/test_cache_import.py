"""`repa cache import --format …` as typed, and what can be done with such a cache afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_layouts import (
    COUNT,
    write_fast_dit,
    write_images,
    write_lightningdit,
    write_mar,
    write_repa,
)
from repa.cli import main, run_command
from repa.data.format.columns import MOMENTS
from repa.data.format.layout import shard_file
from repa.data.format.opening import open_manifest
from repa.data.reading.reader import CacheReader
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.step.checkpoints import checkpoints_of, load_checkpoint
from repa.trainer.step.module import CHECKPOINT_KEY

TRAIN = "--model SiT-T/1 --max-steps 2 --batch-size 4 --set holdout=0"
SMALL = "--set method.depth=1 --set method.projector_width=16 --set preview_every=0 --set log_every=1"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the latents of each layout and images, and a network of two blocks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=3))
    write_repa(tmp_path / "repa")
    write_mar(tmp_path / "mar")
    write_fast_dit(tmp_path / "fast-dit")
    write_lightningdit(tmp_path / "lightningdit", world=2)
    write_images(tmp_path / "images")
    return tmp_path


def run(line: str) -> None:
    """Run a command as it is typed."""
    run_command(line.split())


def error_of(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command that is refused says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code not in (0, None)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("layout", ["repa", "mar", "fast-dit", "lightningdit"])
def test_what_is_imported_trains(layout: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"cache import {layout} --format {layout} --cache cache --resolution 64 --shard-rows 5")
    said = capsys.readouterr().out
    assert f"{COUNT} images" in said
    assert "foreign" in said
    assert ("not a posterior" in said) == (layout in ("fast-dit", "lightningdit"))
    run("cache verify cache")
    run("cache info cache")
    assert "foreign" in capsys.readouterr().out
    run(f"train --cache cache --method none {TRAIN} --set preview_every=0 --run run --dry-run")
    assert "foreign" in capsys.readouterr().out
    run(f"train --cache cache --method none {TRAIN} --set preview_every=0 --run run")
    assert "foreign" in capsys.readouterr().out
    said = load_checkpoint(checkpoints_of(here / "run")[2])[CHECKPOINT_KEY]["latent"]
    assert (said["autoencoder"], said["weights_sha256"]) == (None, None)


def test_a_teacher_is_added_to_an_imported_cache(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("cache import repa --format repa --cache cache --vae demo --shard-rows 5")
    add = "preprocess --cache cache --encoder demo --batch-size 4 --data"
    assert "images lacks 12 images" in error_of(f"{add} images", capsys)
    run(f"{add} repa/images --dry-run")
    assert "foreign" in capsys.readouterr().out
    assert "--vae" in error_of(f"{add} repa/images --vae other", capsys)
    run(f"{add} repa/images")
    run("cache verify cache")
    manifest = open_manifest(here / "cache")
    assert list(manifest.sources) == ["sd-vae", "demo"]
    assert manifest.sources["sd-vae"].notes["images"].startswith("sha256:")
    capsys.readouterr()
    run(f"train --cache cache --method repa {TRAIN} {SMALL} --run run")
    assert "foreign" in capsys.readouterr().out
    assert checkpoints_of(here / "run")
    # the teacher called live, and the rows encoded again, find the images by key too
    run(f"train --cache cache --method repa {TRAIN} {SMALL} --run live --targets online --data repa/images")
    capsys.readouterr()
    run("cache verify cache --reencode 4 --data repa/images")
    said = capsys.readouterr().out
    assert "left out" in said
    assert "demo/patch" in said
    assert "moments" not in said
    # images that changed their sizes are others
    write_images(here / "repa" / "images", ["00000/img00000004.png"])
    big = here / "repa" / "images" / "00000" / "img00000004.png"
    big.write_bytes(big.read_bytes() + b"more")
    assert "not what the teachers" in error_of(f"{add} repa/images", capsys)
    # what is damaged of the teacher is encoded again, of the latents imported again
    file = shard_file(here / "cache", MOMENTS, manifest.columns[MOMENTS], 1)
    file.write_bytes(file.read_bytes()[:-8])
    assert "repa cache import" in error_of("cache repair cache --data repa/images", capsys)
    assert "repa cache import" in error_of(f"{add} repa/images", capsys)
    run("cache import repa --format repa --cache cache --vae demo --shard-rows 5")
    run("cache verify cache")


@pytest.mark.parametrize("layout", ["mar", "lightningdit --data images"])
def test_a_teacher_sees_both_views_of_imported_latents(
    layout: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"cache import {layout.split(maxsplit=1)[0]} --format {layout} --cache cache --resolution 64")
    run("preprocess --cache cache --encoder demo --batch-size 4 --data images")
    manifest = open_manifest(here / "cache")
    assert manifest.views == ("original", "mirrored")
    with CacheReader(here / "cache", ("demo/cls",)) as reader:
        views = np.empty((2, COUNT, *manifest.columns["demo/cls"].shape), np.float16)
        for view, out in enumerate(views):
            reader.read_rows(np.arange(COUNT), ("demo/cls",), {"demo/cls": out}, views=np.full(COUNT, view))
    assert (views[0] != views[1]).any(axis=1).all()
    run(f"train --cache cache --method repa {TRAIN} {SMALL} --run run")
    assert "mirrored image's" in capsys.readouterr().out
    assert checkpoints_of(here / "run")


def test_latents_alone_cannot_be_encoded_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("cache import repa --format repa --cache cache")
    assert "were imported" in error_of("cache verify cache --reencode 2 --data repa/images", capsys)
    add = "preprocess --cache cache --encoder demo --resolution 64 --data"
    run("cache import fast-dit --format fast-dit --cache other")
    said = error_of(f"{add.replace('cache cache', 'cache other')} images", capsys)
    assert "mirrored at random" in said
    with pytest.raises(SystemExit):
        main(f"train --cache other --method repa {TRAIN} {SMALL} --run run".split())
    assert "--cache FOLDER" in capsys.readouterr().err


def test_flags_that_say_nothing_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (
        "--format other",
        "--vae demo",
        "--resolution 64",
        "--scaling-factor 1",
        "--shift-factor 1",
        "--shard-rows 4",
        "--data images",
        "--format repa --data images",
        "--format repa --shard-rows 0",
        "--format repa --scaling-factor 0",
        "--format repa --scaling-factor nan",
        "--format lightningdit --shift-factor 1",
        "--format mar --resolution 100",
    ):
        place = flags.split()[1] if flags.startswith("--format") else "repa"
        assert error_of(f"cache import {place} --cache cache {flags}", capsys)
        assert not (here / "cache").exists()


def test_statistics_given_with_the_latents_are_what_training_normalises_by(here: Path) -> None:
    run("cache import lightningdit --format lightningdit --cache cache --data images")
    run(f"train --cache cache --method none {TRAIN} --set preview_every=0 --run run")
    said = load_checkpoint(checkpoints_of(here / "run")[2])[CHECKPOINT_KEY]["latent"]
    given = torch.load(here / "lightningdit" / "latents_stats.pt", weights_only=True)
    assert said["latents_mean"] == given["mean"].double().flatten().tolist()
    assert said["latents_std"] == given["std"].double().flatten().tolist()
