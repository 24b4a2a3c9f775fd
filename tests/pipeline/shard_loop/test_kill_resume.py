"""Kill −9 at many moments, then the same command: byte for byte the cache of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import signal
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
from warmed import Ended, Warmed, warmed

if TYPE_CHECKING:
    from collections.abc import Iterator

DRIVER = Path(__file__).with_name("kill_driver.py")
KILLS, MANY_KILLS = 4, 20
SHARDS = 3
LIMIT_SECONDS = 900


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four images in four classes, one of them broken."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label in range(4):
        (folder / f"class{label}").mkdir()
        for number in range(6):
            pixels = generator.integers(0, 256, (40 + number, 33 + label, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    (folder / "class1" / "3.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Warmed]:
    """A process that forks others with the command and the models' libraries imported."""
    with warmed(
        "zarr",
        "diffusers.models.autoencoders.autoencoder_kl",
        "repa.commands.preprocess",
        "repa.pipeline.encoders.timm_facts",
        "repa.pipeline.run",
    ) as process:
        yield process


def driven(server: Warmed, folder: Path, *arguments: object) -> dict[str, Any]:
    """What the driver reports at its end."""
    script = folder / DRIVER.name
    shutil.copy(DRIVER, script)
    [ended] = server.run(script, *arguments)
    assert ended.returncode == 0, ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


@pytest.fixture(scope="module")
def caches(images: Path, server: Warmed, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes → folder with an ``undisturbed`` cache and one that was ``killed``."""
    folder = tmp_path_factory.mktemp("processes")
    for report in driven(server, folder, images, folder, KILLS, 0, 1, 3).values():
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
def test_of_many_kills_none_leaves_a_trace(world: int, images: Path, server: Warmed, tmp_path: Path) -> None:
    [report] = driven(server, tmp_path, images, tmp_path, MANY_KILLS, 100, world).values()
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
    assert list(invalid_reasons(cache, manifest)) == [9]
    assert manifest.sources["demo+attention"].notes["form"] == "factored"
    assert verify_cache(cache) == []


COMMAND = """
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace
import repa.pipeline.shard_loop.processes as processes
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.errors import RepaError
if __name__ == "__main__":
    os.setsid()  # in a process group of its own, as a terminal would start it
    # a slow machine's processes may still end by themselves
    processes._GRACE_SECONDS = 900.0
    context = multiprocessing.get_context(sys.argv[3])
    processes.multiprocessing = SimpleNamespace(get_context=lambda _: context)
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


def processes() -> Iterator[tuple[int, list[str]]]:
    """Process ids of this machine that live, with the fields of ``/proc/PID/stat`` from the third on."""
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                fields = (each / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                yield int(each.name), fields


class Running:
    """The command on some devices, in a fork, and its processes started anew (``spawn``) or forks too."""

    def __init__(self, server: Warmed, folder: Path, devices: int, start: str) -> None:
        self.cache = folder / "cache"
        self._server, self._script = server, folder / "command.py"
        self._script.write_text(COMMAND)
        self._ended: Ended | None = None
        self.pid = server.start(self._script, self.cache, devices, start)

    def end(self) -> Ended:
        """Wait for its end."""
        if self._ended is None:
            self._ended = self._server.wait(self.pid, self._script)
        return self._ended

    def wait_for_commits(self, count: int) -> None:
        """Until some shards are committed."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(list(self.cache.glob("commits/demo/*.json"))) < count:
            assert self.pid in dict(processes()), self.end()
            assert time.monotonic() < deadline, f"{count} shards were not committed in {LIMIT_SECONDS} s"
            time.sleep(0.02)

    def members(self) -> list[int]:
        """Processes of its group that live, itself included."""
        return sorted(pid for pid, fields in processes() if int(fields[2]) == self.pid)

    def children(self) -> list[int]:
        """Its direct children that do the work: not the helper of multiprocessing."""
        found = [pid for pid, fields in processes() if int(fields[1]) == self.pid]
        return [
            pid for pid in sorted(found) if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()
        ]

    def assert_nobody_is_left(self) -> None:
        """All its processes end."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while left := self.members():
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.02)


@pytest.fixture
def running(server: Warmed, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """The command as the test's parameter says."""
    command = Running(server, tmp_path, *request.param)
    yield command
    # one that has not got so far has no group yet
    for end in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            end(command.pid, signal.SIGKILL)
    command.end()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("running", [(1, "fork"), (2, "spawn")], indirect=True)
def test_ctrl_c_says_what_is_saved_and_leaves_no_process(running: Running) -> None:
    running.wait_for_commits(2)
    os.killpg(running.pid, signal.SIGINT)  # what a terminal does: to all of the group
    ended = running.end()
    assert ended.returncode == 130
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith("interrupted: ")
    manifest = open_manifest(running.cache)
    saved = 8 * len(committed_shards(running.cache, manifest, "demo"))
    assert f"{saved} of 32768 images of demo" in ended.stderr
    assert "the same command resumes" in ended.stderr
    running.assert_nobody_is_left()
    assert not list(running.cache.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("running", [(2, "fork")], indirect=True)
def test_a_killed_parent_takes_its_processes_with_it(running: Running) -> None:
    running.wait_for_commits(1)
    assert len(running.children()) == 2
    os.kill(running.pid, signal.SIGKILL)
    assert running.end().returncode == -signal.SIGKILL
    running.assert_nobody_is_left()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("running", [(2, "fork")], indirect=True)
def test_a_killed_process_ends_the_run_in_one_line(running: Running) -> None:
    running.wait_for_commits(1)
    os.kill(running.children()[-1], signal.SIGKILL)
    ended = running.end()
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "was killed by SIGKILL" in ended.stderr
    assert "run the same command again" in ended.stderr
    running.assert_nobody_is_left()
