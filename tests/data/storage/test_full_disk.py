"""A disk that is really full, small, and mounted for the test: a clean error, then it goes on."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from repa.data.errors import RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.format.opening import open_manifest
from repa.data.format.survey import committed_shards
from repa.data.testing import folder_contents, synthetic_cache
from repa.data.upkeep.verify import verify_cache

SIZE = 2_000_000
COLUMNS = {
    "sd-vae/moments": ColumnSpec(shape=(8, 8, 8), dtype="float32"),
    "demo/patch": ColumnSpec(shape=(64, 128), dtype="float16"),
    "demo/cls": ColumnSpec(shape=(128,), dtype="float16"),
}
ROWS, SHARD_ROWS = 160, 16  # 2.9 MB, shards of 0.29 MB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of two megabytes; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={SIZE}".encode()
    if sys.platform != "linux" or libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, options):
        pytest.skip(f"no small disk can be mounted: {os.strerror(ctypes.get_errno())}")
    try:
        yield place
    finally:
        libc.umount2(os.fsencode(place), 2)  # MNT_DETACH: whatever the test has left open


def write(path: Path) -> None:
    synthetic_cache(path, num_rows=ROWS, shard_rows=SHARD_ROWS, columns=COLUMNS)


def check_refusal(error: RepaError, path: Path) -> None:
    message = str(error)
    assert "\n" not in message
    assert message.startswith(f"cannot write {path}")
    assert "No space left on device; free some space, then run the same command again" in message


def test_it_fills_up_says_so_and_resumes_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    write(tmp_path / "whole")
    ballast = small_disk / "ballast"
    kept: list[int] = []
    # every time there is room for some shards more
    for size in (1_900_000, 1_500_000, 1_000_000):
        ballast.write_bytes(bytes(max(0, size - _used(small_disk))))
        with pytest.raises(RepaError) as caught:
            write(small_disk / "cache")
        check_refusal(caught.value, small_disk / "cache")
        ballast.write_bytes(b"")
        if not (small_disk / "cache" / "zarr.json").exists():
            kept.append(0)
            continue
        manifest = open_manifest(small_disk / "cache")
        kept.append(
            sum(len(committed_shards(small_disk / "cache", manifest, each)) for each in manifest.sources)
        )
        # what is there is sound, and what is not there is not committed
        assert all("is not committed" in str(finding) for finding in verify_cache(small_disk / "cache"))
        # nothing half written takes up the little room there is
        assert not list((small_disk / "cache").rglob("*.partial"))
    assert kept == sorted(kept)
    assert kept[-1] > 0
    # another disk is large enough
    shutil.copytree(small_disk / "cache", tmp_path / "moved")
    write(tmp_path / "moved")
    assert folder_contents(tmp_path / "moved") == folder_contents(tmp_path / "whole")


def _used(place: Path) -> int:
    usage = shutil.disk_usage(place)
    return usage.total - usage.free


def test_with_room_made_it_goes_on_in_place(small_disk: Path, tmp_path: Path) -> None:
    small = {name: spec for name, spec in COLUMNS.items() if name != "demo/patch"}
    synthetic_cache(tmp_path / "whole", num_rows=ROWS, shard_rows=SHARD_ROWS, columns=small)
    (small_disk / "ballast").write_bytes(bytes(1_700_000))
    with pytest.raises(RepaError) as caught:
        synthetic_cache(small_disk / "cache", num_rows=ROWS, shard_rows=SHARD_ROWS, columns=small)
    check_refusal(caught.value, small_disk / "cache")
    (small_disk / "ballast").unlink()
    synthetic_cache(small_disk / "cache", num_rows=ROWS, shard_rows=SHARD_ROWS, columns=small)
    assert folder_contents(small_disk / "cache") == folder_contents(tmp_path / "whole")
    assert verify_cache(small_disk / "cache") == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
from repa.data.errors import RepaError
sys.path.insert(0, sys.argv[2])
from test_full_disk import write

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    write(Path(sys.argv[1]))
except RepaError as error:
    print(error)
    sys.exit(3)
"""


def test_a_limit_on_the_size_of_files_is_a_clean_error_too(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "cache"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith(f"cannot write {tmp_path / 'cache'}")
    assert "File too large" in done.stdout
    manifest = open_manifest(tmp_path / "cache")
    # the latents' shards fit
    assert committed_shards(tmp_path / "cache", manifest, "sd-vae") == list(range(ROWS // SHARD_ROWS))
    write(tmp_path / "cache")
    assert folder_contents(tmp_path / "cache") == folder_contents(tmp_path / "whole")
