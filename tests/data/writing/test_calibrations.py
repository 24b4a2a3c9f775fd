"""One calibration for all processes, whole or not there, and checked against the manifest."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.format.opening import open_manifest
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.calibrations import ensure_calibration, read_calibration

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = "demo+attention"
ATTENTION = {"demo/q": ColumnSpec(shape=(1, 2, 4, 8), dtype="float16")}
FITTED = bytes(range(256)) * 3
LIMIT_SECONDS = 600


def never() -> bytes:
    raise AssertionError("computed again")


def write(path: Path, columns: dict[str, ColumnSpec], fitted: bytes | None = FITTED) -> None:
    note = None if fitted is None else {"images": 4, "sha256": hashlib.sha256(fitted).hexdigest()}
    synthetic_cache(path, num_rows=10, columns=columns, notes={SOURCE: {"calibration": note}})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that has only the tokens."""
    path = tmp_path / "cache"
    write(path, dict(SYNTHETIC_COLUMNS))
    return path


@pytest.fixture
def calibrated(cache: Path) -> Path:
    """A cache whose committed shards rely on a calibration."""
    ensure_calibration(cache, SOURCE, lambda: FITTED)
    write(cache, ATTENTION)
    return cache


def test_it_is_computed_once_and_read_from_then_on(cache: Path) -> None:
    assert read_calibration(cache, SOURCE) is None
    assert ensure_calibration(cache, SOURCE, lambda: FITTED) == FITTED
    assert (cache / "calibration" / f"{SOURCE}.safetensors").read_bytes() == FITTED
    assert ensure_calibration(cache, SOURCE, never) == FITTED
    assert read_calibration(cache, SOURCE) == FITTED
    assert read_calibration(cache, "other+attention") is None


def test_a_failed_computation_leaves_nothing_and_can_be_repeated(cache: Path) -> None:
    def fail() -> bytes:
        raise OSError(5, "the teacher's disk")

    with pytest.raises(OSError, match="the teacher's disk"):
        ensure_calibration(cache, SOURCE, fail)
    assert read_calibration(cache, SOURCE) is None
    assert ensure_calibration(cache, SOURCE, lambda: FITTED) == FITTED


RANK = """
import os, sys, time
from pathlib import Path
from repa.data.writing.calibrations import ensure_calibration
path, log = Path(sys.argv[1]), Path(sys.argv[2])
def compute():
    with log.open("a") as file:
        file.write("computed ")
    time.sleep(0.5)  # so that the others come, too
    assert sys.stdin.readline() == "finish\\n"
    return f"by {os.getpid()}".encode()
sys.stdin.readline()
sys.stdout.write(ensure_calibration(path, "demo+attention", compute).decode())
"""


def ranks(cache: Path, log: Path, world: int) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-c", RANK, str(cache), str(log)]
    pipe = subprocess.PIPE
    return [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(world)]


def test_of_several_processes_one_computes_and_all_get_its_bytes(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    running = ranks(cache, log, 3)
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\nfinish\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert log.read_text() == "computed "
    assert len(set(outputs)) == 1
    assert outputs[0] in {f"by {process.pid}" for process in running}


def test_when_the_one_that_computes_is_killed_another_takes_over(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first, second = ranks(cache, log, 2)
    assert first.stdin is not None
    first.stdin.write("go\n")
    first.stdin.flush()
    # it has begun, and does not finish
    while not log.exists() or not log.read_text():
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert read_calibration(cache, SOURCE) is None
    output, _ = second.communicate("go\nfinish\n", timeout=LIMIT_SECONDS)
    assert output == f"by {second.pid}"
    assert read_calibration(cache, SOURCE) == output.encode()


def test_threads_take_turns_and_computing_may_declare_sources(cache: Path) -> None:
    calls = []
    start = threading.Barrier(4)

    def compute() -> bytes:
        calls.append(threading.get_ident())
        # declares a source, under the lock of the cache
        write(cache, {"other/cls": ColumnSpec(shape=(3,), dtype="float32")})
        return FITTED

    def ensure(_: int) -> bytes:
        start.wait()
        return ensure_calibration(cache, SOURCE, compute)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ensure, range(4))) == [FITTED] * 4
    assert len(calls) == 1
    assert "other/cls" in open_manifest(cache).columns


def test_one_that_is_not_usable_is_replaced_until_shards_rely_on_it(cache: Path) -> None:
    ensure_calibration(cache, SOURCE, lambda: b"rank 4")
    assert ensure_calibration(cache, SOURCE, never, usable=lambda data: data == b"rank 4") == b"rank 4"
    assert ensure_calibration(cache, SOURCE, lambda: FITTED, usable=lambda data: data == FITTED) == FITTED
    write(cache, ATTENTION)
    assert ensure_calibration(cache, SOURCE, never, usable=lambda data: data == FITTED) == FITTED
    with pytest.raises(CacheError, match=r"shards of demo\+attention .* another calibration; use the flags"):
        ensure_calibration(cache, SOURCE, never, usable=lambda data: False)
    assert read_calibration(cache, SOURCE) == FITTED


def test_a_lost_or_damaged_one_is_made_again_only_if_it_comes_out_the_same(calibrated: Path) -> None:
    file = calibrated / "calibration" / f"{SOURCE}.safetensors"
    file.write_bytes(FITTED[:-1] + b"\0")
    with pytest.raises(CacheError, match=r"in the manifest; restore it, or .* `repa cache repair`"):
        ensure_calibration(calibrated, SOURCE, never)
    file.unlink()
    with pytest.raises(CacheError, match="does not match its checksum"):
        ensure_calibration(calibrated, SOURCE, lambda: b"other")
    assert not file.exists()
    assert ensure_calibration(calibrated, SOURCE, lambda: FITTED) == FITTED
    assert verify_cache(calibrated) == []


@pytest.mark.parametrize("bit", [0, 1000, 8 * len(FITTED) - 1])
def test_verify_finds_a_flipped_bit(calibrated: Path, bit: int) -> None:
    assert verify_cache(calibrated) == []
    file = calibrated / "calibration" / f"{SOURCE}.safetensors"
    data = bytearray(FITTED)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    for columns in (None, ["demo/q"]):
        (finding,) = verify_cache(calibrated, columns)
        assert (finding.path, finding.source, finding.row) == (file, SOURCE, None)
        assert "does not match its checksum" in str(finding)
    assert verify_cache(calibrated, ["demo/patch"]) == []


def test_verify_finds_a_missing_one_and_strays_but_not_those_of_a_run(cache: Path, tmp_path: Path) -> None:
    folder = cache / "calibration"
    ensure_calibration(cache, SOURCE, lambda: FITTED)
    unfinished = folder / f".{SOURCE}.safetensors.partial"
    unfinished.write_bytes(b"half")
    assert verify_cache(cache) == []
    write(cache, ATTENTION)
    assert [finding.path for finding in verify_cache(cache)] == [unfinished]
    unfinished.unlink()
    stray = folder / "notes.txt"
    stray.write_bytes(b"x")
    assert [finding.path for finding in verify_cache(cache)] == [stray]
    stray.unlink()
    (folder / f"{SOURCE}.safetensors").unlink()
    (finding,) = verify_cache(cache)
    assert "is missing; restore it, or have it fitted again by `repa cache repair`" in str(finding)


def test_one_that_no_committed_shard_was_made_with_is_a_stray(cache: Path) -> None:
    ensure_calibration(cache, SOURCE, lambda: FITTED)
    write(cache, ATTENTION, fitted=None)
    (finding,) = verify_cache(cache)
    assert finding.path == cache / "calibration" / f"{SOURCE}.safetensors"
    assert "is not the cache's; delete it" in str(finding)


def test_what_cannot_be_calibrated_leaves_no_cache_behind(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    with pytest.raises(AssertionError):
        ensure_calibration(path, SOURCE, never)
    assert not path.exists()


def test_a_cache_may_be_made_after_its_calibration(tmp_path: Path) -> None:
    path = tmp_path / "new"
    assert ensure_calibration(path, SOURCE, lambda: FITTED) == FITTED
    synthetic_cache(path, num_rows=3)
    assert ensure_calibration(path, SOURCE, never) == FITTED
    assert verify_cache(path) == []


def test_what_the_system_refuses_and_a_folder_of_something_else(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("")
    with pytest.raises(CacheError, match="not empty and no cache"):
        ensure_calibration(tmp_path / "letters", SOURCE, lambda: FITTED)
    assert [each.name for each in (tmp_path / "letters").iterdir()] == ["dear.txt"]
    (cache / "calibration").write_bytes(b"")
    with pytest.raises(RepaError, match="a file stands where a folder is needed") as caught:
        ensure_calibration(cache, SOURCE, never)
    assert "\n" not in str(caught.value)
