"""Kills `repa preprocess` at random moments and starts it again, until the cache is complete; prints JSON.

Run as a script with the image folder, the cache, the number of processes, kills wanted and a seed. PyTorch is
imported and the models are loaded once, then every attempt is a fork of this process: a new interpreter would
spend its life importing. The processes of an attempt find their ranks as under torchrun.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import repa.pipeline.models
import torch
import zarr  # noqa: F401 — so that no attempt spends its time importing it
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.pipeline.config import PreprocessConfig
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterable

    from repa.pipeline.models import SourceModel

RESOLUTION = 32
# so that there is something to calibrate, and to be killed in
ATTENTION = {"demo": (4, 6)}
TOLERANCE = 0.01


def attempt(data: Path, cache: Path, world: int) -> list[int]:
    """Start the command in ``world`` forks; returns their process ids."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            if world > 1:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
            flags = PreprocessFlags(
                data=str(data),
                cache=cache,
                encoders=["demo"],
                vae="demo",
                resolution=RESOLUTION,
                batch_size=4,
                shard_rows=8,
                attention=",".join(map(str, ATTENTION["demo"])),
                attention_kl=TOLERANCE,
            )
            preprocess(flags, console=Console(file=io.StringIO()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return children


def finish(children: list[int], seconds: float | None) -> bool:
    """Wait for the processes, or kill −9 all of them after so many seconds; were they killed?"""
    deadline = None if seconds is None else time.monotonic() + seconds
    left = set(children)
    while left:
        for child in sorted(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.discard(child)
                if os.waitstatus_to_exitcode(status) != 0:
                    raise SystemExit("an attempt failed by itself")
        if deadline is not None and time.monotonic() >= deadline and left:
            for child in left:
                os.kill(child, signal.SIGKILL)
            for child in left:
                os.waitpid(child, 0)
            return True
        time.sleep(0.002)
    return False


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
    models = repa.pipeline.models.load_models(config, config.sources, "cpu")

    def loaded(config: PreprocessConfig, sources: Iterable[str], device: str) -> list[SourceModel]:
        return [model for model in models if set(model.sources) & set(sources)]

    repa.pipeline.models.load_models = loaded


def main(data: Path, cache: Path, world: int, wanted: int, seed: int) -> None:
    """Kill ``wanted`` times at least, over as many caches as that takes; the last one is complete."""
    load_once(data)
    draw = random.Random(seed)
    started = time.monotonic()
    finish(attempt(data, cache.with_name("undisturbed"), world), None)
    whole = time.monotonic() - started
    kills, commits = 0, set()
    while True:
        shutil.rmtree(cache, ignore_errors=True)
        while finish(attempt(data, cache, world), draw.uniform(0, 1.1 * whole)):
            kills += 1
            commits.add(len(list(cache.glob("commits/*/*.json"))))
        if kills >= wanted:
            break
    print(json.dumps({"kills": kills, "commits": sorted(commits), "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
