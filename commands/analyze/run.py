"""`repa analyze` says what a cache holds for training, and what the blocks of a run have learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ..shared.flags import check_ranges

if TYPE_CHECKING:
    from rich.console import Console

    from .flags import AnalyzeFlags

_MOST = 100_000


def analyze(flags: AnalyzeFlags, *, console: Console | None = None) -> None:
    """Measure teachers of a cache, or blocks of a run, into a table, a document and pictures.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    _check(flags)
    times = _times(flags.times)
    if flags.run is not None:
        from .of_run import analyze_run

        analyze_run(flags, flags.run, times, console)
        return
    from .of_cache import analyze_cache

    analyze_cache(flags, console)


def _check(flags: AnalyzeFlags) -> None:
    """Refuse numbers out of their range, and flags that do not go together.

    Raises:
        RepaError: the first of them.
    """
    check_ranges(
        ("--num", flags.num, 8, _MOST),
        ("--k", flags.k, 1, _MOST),
        ("--seed", flags.seed, 0, 2**63 - 1),
        ("--batch-size", flags.batch_size, 1, 10**6),
        ("--pictures", flags.pictures, 0, 256),
    )
    if flags.run is None and flags.step is not None:
        raise RepaError("--step is of a run, and none is given", "add --run", field="--step")
    of_caches = {"--row": flags.rows, "--data": flags.data, "--vae": flags.vae}
    strange = [flag for flag, value in of_caches.items() if value] if flags.run is not None else []
    if strange:
        raise RepaError(
            f"{strange[0]} is of a cache, and --run asks for the blocks of a run",
            "leave one of them out",
            field=strange[0],
        )


def _times(text: str) -> tuple[float, ...]:
    """Parse the times.

    Raises:
        RepaError: one is no number from 0 to 1.
    """
    try:
        times = tuple(dict.fromkeys(float(each) for each in text.split(",")))
    except ValueError:
        times = ()
    if not times or not all(0 <= each <= 1 for each in times):
        raise RepaError(
            f"--times {text} are no times", "give numbers from 0 to 1, as 0.2,0.5,0.8", field="--times"
        )
    return times
