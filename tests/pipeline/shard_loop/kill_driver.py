"""Kills `repa preprocess` again and again and starts it again, until the cache is complete; prints JSON.

Run as a script with the image folder, a folder for the caches, kills wanted, a seed and numbers of processes.
PyTorch is imported and the models are loaded once, then every attempt is a fork of this process, which
imports what the first attempt did: a new interpreter would spend its life importing. The processes of an
attempt find their ranks as under torchrun.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import repa.pipeline.loading
import torch
import zarr  # noqa: F401 — so that no attempt spends its time importing it
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.pipeline.config import PreprocessConfig
from repa.pipeline.shard_loop.processes import end_with_parent
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterable

    from repa.pipeline.columns.models import SourceModel

RESOLUTION = 32
# so that there is something to calibrate, and to be killed in
ATTENTION = {"demo": (4, 6)}
TOLERANCE = 0.01
STAGES = ("calibrating", "committing")


def attempt(data: Path, cache: Path, world: int, imported: Path | None = None) -> list[int]:
    """Start the command in ``world`` forks; returns their process ids.

    The first writes to ``imported`` which modules it has in the end.
    """
    driver, children = os.getpid(), []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            end_with_parent(driver)
            if world > 1:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
            flags = PreprocessFlags(
                data=str(data),
                cache=cache,
                encoders=["demo"],
                vae="demo",
                resolution=RESOLUTION,
                views="flip",
                batch_size=4,
                shard_rows=8,
                attention=",".join(map(str, ATTENTION["demo"])),
                attention_kl=TOLERANCE,
            )
            preprocess(flags, console=Console(file=io.StringIO()))
            if imported is not None and rank == 0:
                imported.write_text("\n".join(sys.modules))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return children


class Aim:
    """What an attempt is killed after: some of its work, seen on the disk, and then a little time.

    Time alone would not do: how far an attempt has come after so many seconds is the machine's affair.
    """

    def __init__(self, cache: Path, stage: str, delay: float, before: int) -> None:
        self._cache, self._stage, self._delay, self._before = cache, stage, delay, before
        self._reached: float | None = None

    def hit(self) -> bool:
        """Is it time?"""
        if self._reached is None and self._begun():
            self._reached = time.monotonic()
        return self._reached is not None and time.monotonic() >= self._reached + self._delay

    def _begun(self) -> bool:
        if self._stage == "calibrating":
            return any(self._cache.glob("calibration/*"))
        return self._stage == "anywhere" or commits_of(self._cache) > self._before


def commits_of(cache: Path) -> int:
    """Shards committed, over all sources."""
    return len(list(cache.glob("commits/*/*.json")))


def stage_of(cache: Path) -> str:
    """How far a cache has come."""
    if commits_of(cache):
        return "committing"
    if any(cache.glob("calibration/*.safetensors")):
        return "calibrated"
    return "calibrating" if any(cache.glob("calibration/*")) else "starting"


def finish(children: list[int], aim: Aim | None) -> bool:
    """Wait for the processes, or kill −9 all of them when ``aim`` is hit; was one killed?"""
    left = set(children)
    while left:
        for child in sorted(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.discard(child)
                if os.waitstatus_to_exitcode(status) != 0:
                    kill(left)
                    raise SystemExit("an attempt failed by itself")
        if aim is not None and left and aim.hit():
            return kill(left)
        time.sleep(0.002)
    return False


def kill(children: set[int]) -> bool:
    """Kill −9 processes that may just have ended by themselves; was one killed?"""
    for child in children:
        os.kill(child, signal.SIGKILL)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if set(ends) - {0, -signal.SIGKILL}:
        raise SystemExit("an attempt failed by itself")
    return -signal.SIGKILL in ends


def load_once(data: Path) -> None:
    """Load the models now, for all attempts."""
    torch.set_num_threads(1)  # a fork does not survive a pool of threads
    config = PreprocessConfig(
        data=str(data),
        cache=Path(),
        encoders=("demo",),
        vae="demo",
        resolution=RESOLUTION,
        batch_size=4,
        attention=ATTENTION,
        attention_kl=TOLERANCE,
    )
    models = repa.pipeline.loading.load_models(config, config.sources, "cpu")

    def loaded(config: PreprocessConfig, sources: Iterable[str], device: str) -> list[SourceModel]:
        return [model for model in models if set(model.sources) & set(sources)]

    repa.pipeline.loading.load_models = loaded


def main(data: Path, folder: Path, wanted: int, seed: int, *worlds: int) -> None:
    """Kill as often with each number of processes; the caches are in ``folder / number``."""
    load_once(data)
    reports = {}
    for world in worlds:
        (folder / str(world)).mkdir(parents=True)
        reports[world] = kill_again_and_again(
            data, folder / str(world) / "killed", world, wanted, seed + world
        )
    print(json.dumps(reports))


def kill_again_and_again(data: Path, cache: Path, world: int, wanted: int, seed: int) -> dict[str, Any]:
    """Kill ``wanted`` times at least, over as many caches as that takes; the last one is complete.

    And until a kill has come in each of `STAGES`: that is waited for, however fast or slow the machine is.
    Each attempt is told on standard error.
    """
    draw = random.Random(seed)
    imported = cache.with_name("imported")
    finish(attempt(data, cache.with_name("undisturbed"), world, imported), None)
    for name in imported.read_text().split("\n"):
        # what is in no file, as a namespace made by hand, is made again by what made it
        with suppress(ImportError):
            importlib.import_module(name)
    # timed without imports, as are the attempts to come
    started = time.monotonic()
    finish(attempt(data, cache, world), None)
    whole = time.monotonic() - started
    say(f"undisturbed: {whole:.2f} s")
    kills: Counter[str] = Counter()
    while kills.total() < wanted or not set(STAGES) <= set(kills):
        shutil.rmtree(cache, ignore_errors=True)
        aims = itertools.chain(["calibrating"], itertools.cycle(["anywhere", "committing", "committing"]))
        killed = True
        while killed:
            aim, share = next(aims), draw.random()
            delay = share * whole * (1 if aim == "anywhere" else 0.1)
            killed = finish(attempt(data, cache, world), Aim(cache, aim, delay, commits_of(cache)))
            if killed:
                kills[stage_of(cache)] += 1
            say(f"{aim} + {delay:.3f} s: {'killed' if killed else 'complete'}, {commits_of(cache)} commits")
    return {"kills": kills.total(), "stages": kills, "seconds": time.monotonic() - started}


def say(what: str) -> None:
    """For who wonders what took so long."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
