"""Fixtures every test may use, and how the tests are shared out among processes."""

from __future__ import annotations

import gc
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from warmed import Warmed
from warmed import warmed as warmed_process

# before anything imports torch, and for the processes that tests start: see repa.cli.main for the first; the
# matrices of the tests are so small that a second thread costs more than it gives
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]

# where no bytecode is kept each process that tests start would compile PyTorch again, for half of its start
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / ".pytest_cache" / "bytecode"))
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]

# each process holds about a gigabyte
MOST_PROCESSES = 8

# these files take longest (`pytest --durations 40`) and are begun first, so that none is left at the end
LONGEST = (
    "pipeline/shard_loop/test_kill_resume.py",
    "pipeline/shard_loop/test_on_ray.py",
    "trainer/run/test_fit.py",
    "trainer/input/test_tar_ranks.py",
    "trainer/run/test_stop.py",
    "trainer/run/test_launch.py",
    "trainer/run/test_haste_runs.py",
    "trainer/run/test_resume.py",
    "test_house.py",
    "commands/demo/test_demo_command.py",
    "data/writing/test_store_crash.py",
    "data/reading/test_reading_cold.py",
    "data/writing/test_store_machine.py",
)

# what a script starts in the background ignores Ctrl-C, and so would all processes that tests send it to
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the same examples every time, however long each takes; others by --hypothesis-profile=default
settings.register_profile(
    "repa", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repa")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer to write anew what tests compare with the code."""
    parser.addoption("--update-messages", action="store_true", help="write tests/messages.txt anew")
    parser.addoption("--update-docs", action="store_true", help="write the generated pages under docs/ anew")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share all tests out among the processors, file by file; files that are named run in this process."""
    # one of the processes that share them comes here too, and must start none
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist"):
        return
    asked = config.option
    asked.loadscopereorder = False  # but the order of `pytest_collection_modifyitems`
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and asked.numprocesses is None and not (asked.tx or asked.usepdb or asked.collectonly):
        asked.numprocesses = min(os.cpu_count() or 1, MOST_PROCESSES)
        asked.dist = "loadfile"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, and leave out what is thorough unless it is asked for."""
    rank = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    if "thorough" in config.option.markexpr:
        return
    thorough = [item for item in items if item.get_closest_marker("thorough")]
    if thorough:
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=thorough)


def pytest_collection_finish() -> None:
    """Keep what the tests import out of garbage collection, which would walk through it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Undo it, or libraries complain of what is left over when the interpreter ends."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference numbers and sample images beside the checkout; tests skip without it."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden" / "repa.npz").exists():
        pytest.skip("the reference numbers and sample images (../shared) are not here")
    return folder


@pytest.fixture(scope="session")
def warmed() -> Iterator[Warmed]:
    """Return a process that forks others with PyTorch and the trainer imported."""
    with warmed_process("repa.trainer.run.fit") as server:
        yield server


@pytest.fixture(autouse=True, scope="session")
def _no_fsync() -> Iterator[None]:
    """Skip fsync: no test outlives a power cut, each costs milliseconds, and their order has its own test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _callbacks_of_packages() -> Iterator[None]:
    """Ask once for each search path who offers Lightning callbacks: each trainer reads all packages anew."""
    registry = sys.modules.get("lightning.fabric.utilities.registry")
    if registry is None:
        yield
        return
    read = registry.entry_points
    offered = cache(lambda _path, group: read(group=group))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", lambda group: offered(tuple(sys.path), group))
        yield


@pytest.fixture(autouse=True)
def _compiling_as_before() -> Iterator[None]:
    """Let no test leave PyTorch's compiler off for those after it, which would then compile nothing."""
    yield
    evaluation = sys.modules.get("torch._dynamo.eval_frame")
    assert evaluation is None or evaluation._stance.stance == "default"


@pytest.fixture(autouse=True)
def _rank_zero() -> None:
    """Make this process the first of its ranks, as Lightning keeps what an earlier test told it."""
    module = sys.modules.get("lightning_utilities.core.rank_zero")
    if module is not None:
        module.rank_zero_only.rank = 0
