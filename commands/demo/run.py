"""`repa demo` does the main job on what the package carries, with the commands that a user would type."""

from __future__ import annotations

import shlex
import time
from dataclasses import fields
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ..shared.methods import backbone_for, chosen_methods, ends_by_itself
from .demo_run import DemoRun

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ...trainer.methods.base import Method

METHODS = "none,repa,haste"
SIZE = "T"
MODEL = f"SiT-{SIZE}/1"
BATCH_SIZE = 32
DEFAULT_STEPS = 360
IMAGES = 2304  # of which the held-out rows are not trained on
HOLDOUT = 256
SAMPLES = 160
SOLVER_STEPS = 12
GUIDANCE = 2


def demo(
    run_command: Callable[[Sequence[str]], None],
    *,
    out: Path,
    steps: int = DEFAULT_STEPS,
    images: int = IMAGES,
    methods: str = METHODS,
) -> None:
    """Preprocess the demo's images, train each method for the same steps, sample, draw, compare.

    The same call resumes a demo that was cut off: each of its commands does.

    Args:
        run_command: runs the words after ``repa``; the command line hands itself in.
        out: folder of the cache, the runs and the report.
        steps: optimiser steps of each method.
        images: images to encode, `HOLDOUT` of which are held out.
        methods: names between commas.

    Raises:
        RepaError: what the commands raise; too few images or steps; a method that is unknown or named twice.
    """
    least = HOLDOUT + BATCH_SIZE
    if steps < 1 or images < least:
        raise RepaError(
            f"--steps {steps} and --images {images} are too few",
            f"give at least 1 and {least}",
            field="--steps" if steps < 1 else "--images",
        )
    chosen = chosen_methods(methods)
    from ...trainer.methods.requirements import StoredAttention

    started = time.perf_counter()
    cache = out / "cache"

    def say_and_run(*words: object) -> None:
        line = [str(word) for word in words]
        print(f"\n$ repa {shlex.join(line)}", flush=True)
        run_command(line)

    needs_attention = any(
        isinstance(need, StoredAttention) for kind in chosen.values() for need in kind.requires
    )
    attention = ("--attention", "haste", "--attention-kl", "1e-3") if needs_attention else ()
    source = ("--data", "demo", "--encoder", "demo", "--limit", images)
    say_and_run("preprocess", *source, *attention, "--cache", cache)
    runs = [
        DemoRun(
            method=method,
            model=backbone_for(kind, MODEL),
            folder=out / "runs" / method,
            samples=out / "samples" / method,
        )
        for method, kind in chosen.items()
    ]
    for run in runs:
        _train(say_and_run, run, chosen[run.method], cache, steps)
    for run in runs:
        solver = ("--solver", "heun", "--steps", SOLVER_STEPS, "--guidance", GUIDANCE, "--seed", 0)
        say_and_run("sample", "--run", run.folder, "--num", SAMPLES, "--npz", "--out", run.samples, *solver)

    from .report import report

    print()
    report(cache, runs, out)
    say_and_run("compare", *(run.folder for run in runs), "--out", out / "compare.html")
    print(f"The demo took {(time.perf_counter() - started) / 60:.1f} minutes.")


def _train(
    say_and_run: Callable[..., None], run: DemoRun, method: type[Method], cache: Path, steps: int
) -> None:
    settings = {
        "holdout": HOLDOUT,
        "ema_decay": 0.98,
        "eval_every": max(steps // 6, 1),
        "log_every": 20,
        "checkpoint_every": 400,
        "preview_every": max(steps // 2, 1),
        "preview_steps": SOLVER_STEPS,
        "preview_guidance": GUIDANCE,
    }
    known = {item.name for item in fields(method.config_class)}
    if "projector_width" in known:
        # the paper's 2,048 are for backbones of 384 channels and more
        settings["method.projector_width"] = 256
    if "drop" in {item.name for item in fields(method.config_class)}:
        # what guidance leads away from must have been trained
        settings["method.drop"] = 0.1
    if ends_by_itself(method, SIZE):
        settings["method.stop"] = max(2 * steps // 3, 1)
    if "warmup_steps" in known:
        # a warm-up and a fall of λ in proportion to the run, as the paper's are to its
        settings["method.warmup_steps"] = min(max(steps // 6, 1), steps - 1)
        settings["method.half_life"] = steps * BATCH_SIZE / 8
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    folders = ("--cache", cache, "--run", run.folder)
    amount = ("--max-steps", steps, "--batch-size", BATCH_SIZE, "--lr", "2e-3")
    say_and_run("train", "--method", run.method, "--model", run.model, *folders, *amount, *words)
