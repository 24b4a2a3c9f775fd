"""`repa evaluate` says how good samples are, by figures that name their reference, count and protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import RepaError
from .flags import EvaluateFlags

if TYPE_CHECKING:
    from rich.console import Console


def evaluate(flags: EvaluateFlags, *, console: Console | None = None) -> None:
    """Measure samples, and write ``evaluation.json`` and ``evaluation.csv``.

    Figures depend on what is sampled and on nothing else: not on devices, threads, or interruptions. Features
    stay on disk, so the same command goes on with what an interrupted one has left, and another metric or
    reference needs no new samples.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from ..shared.sampling_checks import check_numbers
    from ..shared.terminal import PlainConsole

    check_numbers(flags, ("--num", flags.num or 2, 2, 10**9), ("--devices", flags.devices, 1, 1024))
    if flags.bootstrap == 1 or not 0 <= flags.bootstrap <= 10_000:
        raise RepaError(
            f"--bootstrap {flags.bootstrap} gives no spread", "give 2 to 10,000, or 0", field="--bootstrap"
        )
    if flags.labels not in ("balanced", "random"):
        raise RepaError(f"--labels {flags.labels} is unknown", "choose balanced or random", field="--labels")
    _check_source(flags)
    from .run import run_evaluation

    run_evaluation(flags, console or PlainConsole())


def _check_source(flags: EvaluateFlags) -> None:
    """Refuse flags that do not say one thing to measure, or that say nothing of it.

    Raises:
        RepaError: the first that does so.
    """
    sources = {"--run": flags.run, "--ckpt": flags.checkpoint, "--samples": flags.samples}
    given = [flag for flag, value in sources.items() if value is not None]
    if len(given) != 1:
        raise RepaError(
            f"{' and '.join(given) or 'no flag'} {'say' if len(given) > 1 else 'says'} what to evaluate",
            "give one of --run, --ckpt and --samples",
            field=given[1] if given else "--run",
        )
    if flags.step is not None and flags.run is None:
        raise RepaError("--step chooses a checkpoint of a run", "give --run, or leave it out", field="--step")
    if flags.samples is None:
        return
    default = EvaluateFlags()
    of_sampling = (
        *("family", "labels", "solver", "steps", "shift", "guidance", "guidance_cls", "guidance_channels"),
        *("interval", "bank", "seed", "weights", "vae", "keep_samples"),
    )
    for name in of_sampling:
        if getattr(flags, name) != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            raise RepaError(
                f"{flag} is of sampling, and --samples are there already", "leave it out", field=flag
            )
