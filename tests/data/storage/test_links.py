"""Nothing is written through a link that somebody has put into a cache or a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from repa.data.errors import RepaError
from repa.data.format.layout import GROUP_FILE, calibration_file, commit_file, commit_folder, shard_file
from repa.data.format.opening import open_manifest
from repa.data.storage.files import (
    create_file,
    locked,
    open_to_append,
    os_errors,
    partial_path,
    write_file,
)
from repa.data.testing import SYNTHETIC_COLUMNS, folder_contents, synthetic_cache
from repa.data.upkeep.repair import withdraw
from repa.data.writing.calibrations import ensure_calibration
from repa.data.writing.writer import SourceWriter
from repa.trainer.sampling.pictures import save_array_file, save_png
from repa.trainer.step.checkpoints import AtomicCheckpointIO, checkpoint_path

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's, with a file that is precious."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "precious").write_bytes(b"precious")
    return folder


def test_what_a_killed_process_left_is_replaced_whatever_it_was(tmp_path: Path, outside: Path) -> None:
    path = tmp_path / "file"
    partial_path(path).symlink_to(outside / "precious")
    write_file(path, b"new", tmp_path)
    assert path.read_bytes() == b"new"
    partial_path(path).write_bytes(b"left")
    write_file(path, b"newer", tmp_path)
    assert path.read_bytes() == b"newer"
    path.unlink()
    path.symlink_to(outside / "precious")
    write_file(path, b"newest", tmp_path)
    assert not path.is_symlink()
    assert (outside / "precious").read_bytes() == b"precious"


def test_a_new_file_is_its_own(tmp_path: Path, outside: Path) -> None:
    path = tmp_path / "new"
    path.symlink_to(outside / "made")
    os.close(create_file(path))
    assert not path.is_symlink()
    assert not (outside / "made").exists()


def test_no_folder_below_the_root_is_a_link(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    (root / "a").symlink_to(outside)
    for path in (root / "a" / "file", root / "a" / "b" / "file"):
        with pytest.raises(RepaError), os_errors("write", path):
            write_file(path, b"x", root)
    assert folder_contents(outside).keys() == {"precious"}
    # the root is the user's own choice
    (tmp_path / "linked").symlink_to(root)
    write_file(tmp_path / "linked" / "file", b"x", tmp_path / "linked")
    assert (root / "file").read_bytes() == b"x"


def test_locks_and_logs_are_no_links(tmp_path: Path, outside: Path) -> None:
    path = tmp_path / "log"
    path.symlink_to(outside / "precious")
    with pytest.raises(RepaError), os_errors("write", path), locked(path):
        pass
    with pytest.raises(RepaError), os_errors("write", path):
        open_to_append(path)
    assert (outside / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("where", ["demo", "commits", "commits/demo", "demo/patch", "demo/patch/c"])
def test_a_source_is_not_written_through_a_linked_folder(tmp_path: Path, outside: Path, where: str) -> None:
    cache = tmp_path / "cache"
    manifest = synthetic_cache(cache, num_rows=9, written=False)
    path = cache / where
    if path.exists():
        path.rename(outside / "was")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside)
    before = folder_contents(outside)
    with pytest.raises(RepaError), SourceWriter(cache, manifest, "demo", [0]) as writer, writer.shard(0):
        pass
    assert folder_contents(outside) == before


def test_shards_calibrations_and_documents_replace_links(tmp_path: Path, outside: Path) -> None:
    cache = tmp_path / "cache"
    manifest = synthetic_cache(cache, num_rows=9, written=False)
    commit_folder(cache, "demo").mkdir(parents=True)
    calibration_file(cache, "demo").parent.mkdir()
    shard_file(cache, "demo/cls", SYNTHETIC_COLUMNS["demo/cls"], 0).parent.mkdir(parents=True)
    for path in (
        cache / GROUP_FILE,
        commit_file(cache, "demo", 0),
        calibration_file(cache, "demo"),
        shard_file(cache, "demo/cls", SYNTHETIC_COLUMNS["demo/cls"], 0),
    ):
        partial_path(path).symlink_to(outside / "precious")
    ensure_calibration(cache, "demo", lambda: b"fitted")
    synthetic_cache(cache, num_rows=9)
    assert open_manifest(cache) == manifest
    assert calibration_file(cache, "demo").read_bytes() == b"fitted"
    assert (outside / "precious").read_bytes() == b"precious"


def test_nothing_is_deleted_through_a_link(tmp_path: Path, outside: Path) -> None:
    cache = tmp_path / "cache"
    manifest = synthetic_cache(cache, num_rows=9)
    (cache / "demo" / "patch" / "c").rename(outside / "c")
    (cache / "demo" / "patch" / "c").symlink_to(outside / "c")
    before = folder_contents(tmp_path)
    with pytest.raises(RepaError):
        withdraw(cache, manifest, {"demo": [0, 1]})
    after = folder_contents(tmp_path)
    assert {name: each for name, each in after.items() if not name.endswith(".lock")} == {
        name: each for name, each in before.items() if not name.endswith(".lock")
    }


def test_a_run_is_not_written_through_links(tmp_path: Path, outside: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").symlink_to(outside / "precious")
    (run / "samples").symlink_to(outside)
    checkpoint = checkpoint_path(run, 1)
    checkpoint.parent.mkdir()
    partial_path(checkpoint).symlink_to(outside / "precious")
    AtomicCheckpointIO().save_checkpoint({"a": 1}, checkpoint)
    assert not checkpoint.is_symlink()
    picture = Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8))
    with pytest.raises(RepaError):
        save_png(picture, run / "samples" / "a.png", run)
    for name in ("a.png", "a.npz"):
        partial_path(run / name).symlink_to(outside / "precious")
    save_png(picture, run / "a.png", run)
    save_array_file(run / "a.npz", [np.zeros((1, 2, 2, 3), dtype=np.uint8)], np.zeros(1, dtype=np.int64))
    with np.load(run / "a.npz") as arrays:
        assert arrays["arr_0"].shape == (1, 2, 2, 3)
    assert folder_contents(outside).keys() == {"precious"}
    assert (outside / "precious").read_bytes() == b"precious"
