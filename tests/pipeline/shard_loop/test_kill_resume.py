"""Kill −9 at many moments, then the same command: byte for byte the cache of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from repa.data.format.opening import open_manifest
from repa.data.format.survey import committed_shards, invalid_reasons
from repa.data.testing import folder_contents
from repa.data.upkeep.verify import verify_cache

if TYPE_CHECKING:
    from collections.abc import Iterator

DRIVER = Path(__file__).with_name("kill_driver.py")
KILLS, MANY_KILLS = 4, 20
SHARDS = 5
LIMIT_SECONDS = 900


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images in four classes, one of them broken."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label in range(4):
        (folder / f"class{label}").mkdir()
        for number in range(10):
            pixels = generator.integers(0, 256, (40 + number, 33 + label, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    (folder / "class1" / "3.png").write_bytes(b"broken")
    return folder


def driven(*arguments: object) -> dict[str, Any]:
    """What the driver reports at its end."""
    command = [sys.executable, str(DRIVER), *map(str, arguments)]
    # in a group of its own: a driver that hangs is ended with its attempts
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as driver:
        try:
            output, errors = driver.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(driver.pid, signal.SIGKILL)
            _, errors = driver.communicate()
            pytest.fail(f"the driver did not end within {LIMIT_SECONDS} s; it said:\n{errors}")
    assert driver.returncode == 0, errors
    report: dict[str, Any] = json.loads(output)
    return report


@pytest.fixture(scope="module")
def caches(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes → folder with an ``undisturbed`` cache and one that was ``killed``."""
    folder = tmp_path_factory.mktemp("processes")
    for report in driven(images, folder, KILLS, 0, 1, 3).values():
        assert report["kills"] >= KILLS
        assert {"calibrating", "committing"} <= set(report["stages"])
    return {world: folder / str(world) for world in (1, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_killed_and_resumed_is_the_undisturbed_cache(world: int, caches: dict[int, Path]) -> None:
    folder = caches[world]
    assert folder_contents(folder / "killed") == folder_contents(folder / "undisturbed")


@pytest.mark.thorough
@pytest.mark.parametrize("world", [1, 3])
def test_of_many_kills_none_leaves_a_trace(world: int, images: Path, tmp_path: Path) -> None:
    [report] = driven(images, tmp_path, MANY_KILLS, 100, world).values()
    assert report["kills"] >= MANY_KILLS
    folder = tmp_path / str(world)
    assert folder_contents(folder / "killed") == folder_contents(folder / "undisturbed")


@pytest.mark.slow
def test_one_process_and_three_write_the_same_bytes(caches: dict[int, Path]) -> None:
    cache = caches[1] / "undisturbed"
    assert folder_contents(cache) == folder_contents(caches[3] / "undisturbed")
    manifest = open_manifest(cache)
    assert manifest.num_shards == SHARDS
    for source in ("sd-vae", "demo", "demo+attention"):
        assert committed_shards(cache, manifest, source) == list(range(SHARDS))
    assert list(invalid_reasons(cache, manifest)) == [13]
    assert manifest.sources["demo+attention"].notes["form"] == "factored"
    assert verify_cache(cache) == []


COMMAND = """
import sys
from pathlib import Path
import repa.pipeline.shard_loop.processes
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.errors import RepaError
if __name__ == "__main__":
    # a slow machine's processes may still end by themselves
    repa.pipeline.shard_loop.processes._GRACE_SECONDS = 900.0
    try:
        cache, devices = Path(sys.argv[1]), int(sys.argv[2])
        preprocess(
            PreprocessFlags(
                data="demo", cache=cache, limit=32768, batch_size=4, shard_rows=8, devices=devices
            )
        )
    except RepaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
"""


class Running:
    """The command in a process group of its own, as a terminal would start it."""

    def __init__(self, folder: Path, devices: int) -> None:
        self.cache = folder / "cache"
        (folder / "command.py").write_text(COMMAND)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "command.py"), str(self.cache), str(devices)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_commits(self, count: int) -> None:
        """Until some shards are committed."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(list(self.cache.glob("commits/demo/*.json"))) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"{count} shards were not committed in {LIMIT_SECONDS} s"
            time.sleep(0.02)

    def members(self) -> list[int]:
        """Processes of its group that live, itself included."""
        found = []
        for each in Path("/proc").iterdir():
            if each.name.isdigit():
                try:
                    fields = (each / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[2]) == self.process.pid and fields[0] != "Z":
                    found.append(int(each.name))
        return sorted(found)

    def children(self) -> list[int]:
        """Its direct children that do the work: not the helper of multiprocessing."""
        found = []
        for child in self.members():
            command = Path(f"/proc/{child}/cmdline").read_text()
            if child != self.process.pid and "spawn_main" in command:
                found.append(child)
        return found

    def assert_nobody_is_left(self) -> None:
        """All its processes end."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while left := self.members():
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.02)


@pytest.fixture
def running(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """The command on as many devices as the test's parameter says."""
    command = Running(tmp_path, request.param)
    yield command
    with suppress(ProcessLookupError):
        os.killpg(command.process.pid, signal.SIGKILL)
    command.process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("running", [1, 2], indirect=True)
def test_ctrl_c_says_what_is_saved_and_leaves_no_process(running: Running) -> None:
    running.wait_for_commits(2)
    os.killpg(running.process.pid, signal.SIGINT)  # what a terminal does: to all of the group
    _, errors = running.process.communicate(timeout=LIMIT_SECONDS)
    assert running.process.returncode == 130
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("interrupted: ")
    manifest = open_manifest(running.cache)
    saved = 8 * len(committed_shards(running.cache, manifest, "demo"))
    assert f"{saved} of 32768 images of demo" in errors
    assert "the same command resumes" in errors
    running.assert_nobody_is_left()
    assert not list(running.cache.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("running", [2], indirect=True)
def test_a_killed_parent_takes_its_processes_with_it(running: Running) -> None:
    running.wait_for_commits(1)
    running.process.kill()
    running.process.wait()
    running.assert_nobody_is_left()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("running", [2], indirect=True)
def test_a_killed_process_ends_the_run_in_one_line(running: Running) -> None:
    running.wait_for_commits(1)
    os.kill(running.children()[-1], signal.SIGKILL)
    _, errors = running.process.communicate(timeout=LIMIT_SECONDS)
    assert running.process.returncode == 1
    assert len(errors.splitlines()) == 1, errors
    assert "was killed by SIGKILL" in errors
    assert "run the same command again" in errors
    running.assert_nobody_is_left()
