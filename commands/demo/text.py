"""`repa demo --text` does the main job with captions, from drawn images to images of prompts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ...data.storage.files import write_file
from ..shared.methods import backbone_for, chosen_methods
from .demo_run import DemoRun
from .run import IMAGES
from .typed import Typist, check_amounts, sample, train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

METHODS = "none,repa"
SIZE = "MMDiT-6"
MODEL = f"{SIZE}/1"
DEFAULT_STEPS = 360
NOISES = 2
"""Samples of each prompt."""

GUIDANCE = 1.5
TEXT_ENCODER = "demo-text"
PROMPTS_FILE = "prompts.txt"


def demo_of_text(
    run_command: Callable[[Sequence[str]], None],
    *,
    out: Path,
    steps: int = DEFAULT_STEPS,
    images: int = IMAGES,
    methods: str = METHODS,
) -> None:
    """Preprocess the demo's images and captions, train each method, sample prompts, draw, compare.

    It shares the images of `demo` where that has the same folder. The same call resumes one that was cut off.

    Args:
        run_command: runs the words after ``repa``; the command line hands itself in.
        out: folder of the cache, the runs and the report.
        steps: optimiser steps of each method.
        images: images to encode, `HOLDOUT` of which are held out.
        methods: names between commas.

    Raises:
        RepaError: transformers is not installed; what the commands raise; too few images or steps; a method
            that is unknown or named twice.
    """
    from ...pipeline.text.tokenizers import transformers

    check_amounts(steps, images)
    chosen = chosen_methods(methods)
    transformers()
    started = time.perf_counter()
    cache = out / "cache"
    typist = Typist(run_command)
    source = ("--data", "demo", "--encoder", "demo", "--text-encoder", TEXT_ENCODER, "--limit", images)
    typist("preprocess", *source, "--cache", cache)
    runs = [
        DemoRun(
            method=method,
            model=backbone_for(kind, MODEL),
            folder=out / "runs" / f"{method}-text",
            samples=out / "samples" / f"{method}-text",
        )
        for method, kind in chosen.items()
    ]
    settings = {"condition": f"{TEXT_ENCODER}/states", "adaln_zero": "true"}
    for run in runs:
        train(typist, run, chosen[run.method], cache, steps, size=SIZE, guidance=GUIDANCE, settings=settings)

    from .prompts import prompts
    from .text_report import report

    file = out / PROMPTS_FILE
    write_file(file, "".join(f"{prompt}\n" for prompt in prompts()).encode(), out)
    for run in runs:
        sample(typist, run, NOISES * len(prompts()), GUIDANCE, "--prompts", file)
    print()
    report(cache, runs, out)
    typist("compare", *(run.folder for run in runs), "--out", out / "compare-text.html")
    print(f"The demo took {(time.perf_counter() - started) / 60:.1f} minutes.")
