"""`repa demo` does the main job on what the package carries, with the commands that a user would type."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..shared.methods import backbone_for, chosen_methods
from .demo_run import DemoRun
from .typed import Typist, check_amounts, sample, train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

METHODS = "none,repa,haste"
SIZE = "T"
MODEL = f"SiT-{SIZE}/1"
DEFAULT_STEPS = 360
IMAGES = 2304  # of which the held-out rows are not trained on
SAMPLES = 160
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
    check_amounts(steps, images)
    chosen = chosen_methods(methods)
    from ...trainer.methods.requirements import StoredAttention

    started = time.perf_counter()
    cache = out / "cache"
    typist = Typist(run_command)
    needs_attention = any(
        isinstance(need, StoredAttention) for kind in chosen.values() for need in kind.requires
    )
    attention = ("--attention", "haste", "--attention-kl", "1e-3") if needs_attention else ()
    source = ("--data", "demo", "--encoder", "demo", "--limit", images)
    typist("preprocess", *source, *attention, "--cache", cache)
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
        train(typist, run, chosen[run.method], cache, steps, size=SIZE, guidance=GUIDANCE, settings={})
    for run in runs:
        sample(typist, run, SAMPLES, GUIDANCE)

    from .report import report

    print()
    report(cache, runs, out)
    typist("compare", *(run.folder for run in runs), "--out", out / "compare.html")
    print(f"The demo took {(time.perf_counter() - started) / 60:.1f} minutes.")
