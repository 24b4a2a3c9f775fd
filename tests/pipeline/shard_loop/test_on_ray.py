"""The shard loop on a Ray cluster of this machine, two workers of which one is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.errors import RepaError
from repa.data.format.layout import LOCK_FILE, commit_folder
from repa.data.format.opening import open_manifest
from repa.data.format.survey import committed_shards
from repa.data.testing import folder_contents
from repa.pipeline.config import PreprocessConfig
from repa.pipeline.plan import Plan, make_plan
from repa.pipeline.run import run
from repa.pipeline.shard_loop import on_ray
from repa.pipeline.shard_loop.on_ray import EncodeShard, RayPool, work_on_ray
from rich.console import Console

SOURCES = ("sd-vae", "demo")
# ends the process that reads the sixth image, the first time that anybody does
DEADLY = """
import os
import signal
from pathlib import Path

from repa.pipeline.images.listed import ListedImages, Listing


class Deadly(ListedImages):
    kind = "deadly"

    def list_images(self):
        self.paths = sorted(str(path) for path in Path(self.place).rglob("*.png"))
        sizes = [os.stat(path).st_size for path in self.paths]
        return Listing(keys=self.paths, labels=None, class_names=[], sizes=sizes)

    def read(self, number):
        if number == 5 and not Path("victim").exists():
            Path("victim").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return Path(self.paths[number]).read_bytes()
"""


@pytest.fixture
def plan(pictures: Path, tmp_path: Path) -> Plan:
    """The plan of the command that made `complete_cache`."""
    return make_plan(
        PreprocessConfig(
            data=str(pictures),
            cache=tmp_path / "cache",
            encoders=("demo",),
            vae="demo",
            resolution=16,
            batch_size=1,
            shard_rows=4,
        )
    )


@pytest.fixture
def encode(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A worker in this process; give it the number of a shard."""
    monkeypatch.chdir(Path.cwd())
    workers: dict[float, EncodeShard] = {}

    def do(shard: int, gpus: float = 0.0, folder: str = "") -> dict[str, Any]:
        if gpus not in workers:
            workers[gpus] = EncodeShard(
                plan.config, plan.manifest, SOURCES, gpus, 1, folder or str(Path.cwd())
            )
        row = workers[gpus]({"shard": np.array([shard])})
        assert row["shard"] == [shard]
        return dict(json.loads(row["answer"][0]))

    return do


def test_a_worker_writes_what_a_process_does(
    encode: Callable[..., dict[str, Any]], plan: Plan, complete_cache: Path
) -> None:
    for shard in (2, 0, 1):
        answer = encode(shard)
        assert answer["images"] == 4
        assert answer["rows"] == {"sd-vae": 4, "demo": 4}
    # a shard that is there already is counted by nobody twice
    assert encode(1)["images"] == 0
    # all but the manifest, which notes the latents' statistics: they are measured by who gave the command
    differing = folder_contents(plan.config.cache).items() ^ folder_contents(complete_cache).items()
    assert not [name for name, _ in differing if "/" in name]


def test_a_worker_waits_for_the_lock_of_one_that_has_gone(
    encode: Callable[..., dict[str, Any]], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(0)
    lock = commit_folder(plan.config.cache, "demo") / LOCK_FILE
    hold = f"import fcntl; f = open({str(lock)!r}, 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 1)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        slept = []

        def end_the_other(seconds: float) -> None:
            slept.append(seconds)
            other.kill()
            other.wait()

        monkeypatch.setattr(on_ray.time, "sleep", end_the_other)
        assert encode(1)["images"] == 4
        assert len(slept) == 1


def test_a_worker_says_what_the_user_can_mend(
    encode: Callable[..., dict[str, Any]],
    plan: Plan,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert encode(0, gpus=0.25, folder=str(tmp_path / "nowhere"))["error"][2] == ""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert encode(0, gpus=1.0)["error"][2] == "--worker-gpus"
    (pictures / "class0" / "0.png").unlink()
    assert encode(0)["error"][2] == "--data"
    assert not plan.config.cache.exists()


class LostError(Exception):
    """What Ray would raise."""


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in turn and in this process, of a cluster without GPUs."""
    resources = {"CPU": 2.0}
    ray = SimpleNamespace(
        is_initialized=lambda: True,
        cluster_resources=lambda: resources,
        nodes=lambda: [{"Alive": True, "Resources": resources}, {"Alive": False, "Resources": {"GPU": 8.0}}],
        exceptions=SimpleNamespace(RayError=LostError),
    )

    def rows(
        _: object,
        plan: Plan,
        sources: tuple[str, ...],
        shards: list[int],
        pool: RayPool,
        gpus: float,
        cpus: int,
    ) -> Iterator[dict[str, Any]]:
        worker = EncodeShard(plan.config, plan.manifest, sources, gpus, cpus, str(Path.cwd()))
        for shard in shards:
            row = worker({"shard": np.array([shard])})
            yield {name: values[0] for name, values in row.items()}

    monkeypatch.setattr(on_ray, "_import_ray", lambda: ray)
    monkeypatch.setattr(on_ray, "_rows", rows)


def nothing(*_: object) -> None:
    """A report or note that nobody looks at."""


@pytest.mark.usefixtures("in_this_process")
def test_what_workers_did_is_added_up(plan: Plan) -> None:
    reports: list[tuple[dict[str, int], int]] = []
    notes: list[str] = []
    plan = replace(plan, share=range(1, 3))
    [tally] = work_on_ray(plan, RayPool(), lambda *done: reports.append(done), notes.append)
    assert reports == [({"sd-vae": 4, "demo": 4}, 4)] * 2
    assert tally.images == 8
    assert tally.written.rows == {"sd-vae": 8, "demo": 8}
    assert tally.written.bytes["sd-vae/moments"] == 8 * 4 * 8 * 2 * 2
    assert tally.load_seconds > 0
    assert not notes
    cache = plan.config.cache
    assert committed_shards(cache, open_manifest(cache), "demo") == [1, 2]


@pytest.mark.usefixtures("in_this_process")
def test_what_a_worker_refuses_the_command_does(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    notes: list[str] = []
    with pytest.raises(RepaError) as caught:
        work_on_ray(plan, RayPool(gpus=1.0), nothing, notes.append)
    assert caught.value.field == "--worker-gpus"
    # the machine with GPUs is not alive: the user is told what is waited for
    assert len(notes) == 1


@pytest.mark.usefixtures("in_this_process")
def test_what_ray_gives_up_is_one_line(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> Iterator[dict[str, Any]]:
        raise LostError("long story\n\n  the worker died\n")
        yield {}

    monkeypatch.setattr(on_ray, "_rows", lost)
    with pytest.raises(RepaError) as caught:
        work_on_ray(plan, RayPool(), nothing, nothing)
    assert "\n" not in str(caught.value)
    assert "the worker died" in caught.value.what


@pytest.mark.usefixtures("in_this_process")
def test_sigterm_interrupts_whatever_ray_makes_of_it(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> Iterator[dict[str, Any]]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from ()

    shut: list[bool] = []
    ray = on_ray._import_ray()
    ray.is_initialized = lambda: False
    ray.init = lambda **_: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ray.shutdown = lambda: shut.append(True)
    monkeypatch.setattr(on_ray, "_rows", ended)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            work_on_ray(plan, RayPool(), nothing, nothing)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert shut == [True]


def test_without_ray(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RepaError) as caught:
        work_on_ray(plan, RayPool(), nothing, nothing)
    assert caught.value.field == "--launcher"


def test_ray_within_a_launcher(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RepaError) as caught:
        run(plan.config, Console(file=io.StringIO()), pool=RayPool())
    assert caught.value.field == "--launcher"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two workers on this machine."""
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    pytest.importorskip("ray.data", reason="needs the extra `ray`")
    with (
        pytest.MonkeyPatch.context() as patch,
        # its sockets need a short path
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        # no token in the home folder, and nothing told to anybody
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2,
            object_store_memory=80 << 20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            yield ray
        finally:
            ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_killed_worker_loses_a_shard_at_most(
    cluster: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.chdir(tmp_path)
    flags = PreprocessFlags(
        data=f"deadly:Deadly?{pictures.name}",
        cache=Path("spread"),
        encoders=["demo"],
        vae="demo",
        resolution=16,
        batch_size=1,
        shard_rows=4,
        labels="none",
        launcher="ray",
        pool="2",
        worker_gpus=0.0,
    )
    output = io.StringIO()
    preprocess(flags, console=Console(file=output, width=200))
    victim = int((tmp_path / "victim").read_text())
    assert victim != os.getpid()
    assert "wrote 12 images" in output.getvalue()
    # what one process makes of the same images, which kill nobody any more
    preprocess(
        replace(flags, cache=Path("alone"), launcher=None, pool=None, worker_gpus=None),
        console=Console(file=io.StringIO()),
    )
    assert folder_contents(tmp_path / "spread") == folder_contents(tmp_path / "alone")
