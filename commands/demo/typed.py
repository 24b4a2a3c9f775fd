"""The commands that a demo types, each said before it is run."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ..shared.methods import ends_by_itself

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ...trainer.methods.base import Method
    from .demo_run import DemoRun

BATCH_SIZE = 32
HOLDOUT = 256
SOLVER_STEPS = 12


class Typist:
    """Say a command as a user would type it, and run it.

    Args:
        run_command: runs the words after ``repa``.
    """

    def __init__(self, run_command: Callable[[Sequence[str]], None]) -> None:
        self._run_command = run_command

    def __call__(self, *words: object) -> None:
        """Run ``repa`` with these words.

        Raises:
            RepaError: of the command.
        """
        line = [str(word) for word in words]
        print(f"\n$ repa {shlex.join(line)}", flush=True)
        self._run_command(line)


def train(
    typist: Typist,
    run: DemoRun,
    method: type[Method],
    cache: Path,
    steps: int,
    *,
    size: str,
    guidance: float,
    settings: Mapping[str, object],
) -> None:
    """Train a run of the demo.

    Args:
        typist: runs the command.
        run: what is trained.
        method: class of its method.
        cache: the demo's cache.
        steps: of the optimiser.
        size: name of the backbone's size, whose presets may end a method.
        guidance: of previews.
        settings: more of them.
    """
    chosen = {
        "holdout": HOLDOUT,
        "ema_decay": 0.98,
        "eval_every": max(steps // 6, 1),
        "log_every": 20,
        "checkpoint_every": 400,
        "preview_every": max(steps // 2, 1),
        "preview_steps": SOLVER_STEPS,
        "preview_guidance": guidance,
        **settings,
    }
    known = {item.name for item in fields(method.config_class)}
    if "projector_width" in known:
        # the paper's 2,048 are for backbones of 384 channels and more
        chosen["method.projector_width"] = 256
    if "drop" in known:
        # what guidance leads away from must have been trained
        chosen["method.drop"] = 0.1
    if ends_by_itself(method, size):
        chosen["method.stop"] = max(2 * steps // 3, 1)
    if "warmup_steps" in known:
        # a warm-up and a fall of λ in proportion to the run, as the paper's are to its
        chosen["method.warmup_steps"] = min(max(steps // 6, 1), steps - 1)
        chosen["method.half_life"] = steps * BATCH_SIZE / 8
    words = [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
    folders = ("--cache", cache, "--run", run.folder)
    amount = ("--max-steps", steps, "--batch-size", BATCH_SIZE, "--lr", "2e-3")
    typist("train", "--method", run.method, "--model", run.model, *folders, *amount, *words)


def sample(typist: Typist, run: DemoRun, num: int, guidance: float, *words: object) -> None:
    """Sample from a run of the demo.

    Args:
        typist: runs the command.
        run: trained.
        num: number of images.
        guidance: scale of it.
        words: more flags.
    """
    solver = ("--solver", "heun", "--steps", SOLVER_STEPS, "--guidance", guidance, "--seed", 0)
    typist("sample", "--run", run.folder, "--num", num, "--npz", "--out", run.samples, *solver, *words)


def check_amounts(steps: int, images: int) -> None:
    """Refuse too few steps or images.

    Raises:
        RepaError: which.
    """
    least = HOLDOUT + BATCH_SIZE
    if steps < 1 or images < least:
        raise RepaError(
            f"--steps {steps} and --images {images} are too few",
            f"give at least 1 and {least}",
            field="--steps" if steps < 1 else "--images",
        )
