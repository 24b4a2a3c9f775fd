"""Fixtures every test may use."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

# before anything imports torch; see repa.cli.main
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]

# what a script starts in the background ignores Ctrl-C, and so would all processes that tests send it to
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the same examples every time, however long each takes; others by --hypothesis-profile=default
settings.register_profile(
    "repa", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repa")


def pytest_collection_finish() -> None:
    """What the tests import lives to the end: no collection need walk through it again, 0.4 seconds each."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Undo it, or libraries complain of what is left over when the interpreter ends."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers and sample images beside the checkout; tests skip without it."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden" / "repa.npz").exists():
        pytest.skip("the reference numbers and sample images (../shared) are not here")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _no_fsync() -> Iterator[None]:
    """No test outlives a power cut, and each fsync costs milliseconds; their order has its own test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
