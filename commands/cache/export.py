"""`repa cache export` and `repa cache import` turn a cache into WebDataset tars and back."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.units import counted
from ...pipeline.images.names import default_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console

    from ...data.tars.export import Transfer

FORMATS = ("webdataset",)


def export(
    *,
    out: Path,
    cache: Path | str | None = None,
    form: str = FORMATS[0],
    columns: str | None = None,
    console: Console | None = None,
) -> None:
    """Write columns of a cache as tars, one for each shard. The same command goes on where it was stopped.

    Args:
        out: folder of the tars.
        cache: the cache, or its address in a bucket; by default the only one under ``caches/``.
        form: ``webdataset``.
        columns: names with commas between them; all by default.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from ...data.storage.bucket import cache_path
    from ...data.tars.export import export_cache, export_pattern
    from ..shared.terminal import PlainConsole

    if form not in FORMATS:
        raise RepaError(f"--format {form!r} is unknown", f"there is {', '.join(FORMATS)}")
    names = tuple(name.strip() for name in (columns or "").split(",") if name.strip())
    if columns is not None and not names:
        raise RepaError(
            "--columns names no column", "name some, as sd-vae/moments,dinov2-b/patch, or drop it"
        )
    console = console or PlainConsole()
    path = cache_path(cache or default_cache())
    started = time.perf_counter()
    with transfer_bar("exporting", console) as progress:
        done = export_cache(path, out, names, progress)
    say_transfer(done, "written", time.perf_counter() - started, console)
    pattern = export_pattern(out, done.shards)
    console.print(
        f"Wrote {pattern}; `repa cache import '{pattern}' --cache CACHE` makes a cache of it again, "
        f"`repa train --cache '{pattern}'` reads it as it is.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def import_tars(*, tars: str, cache: Path, console: Console | None = None) -> None:
    """Make the cache that tars were exported from. The same command goes on where it was stopped.

    Args:
        tars: pattern of the tars, all of one export.
        cache: folder of the cache.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from ...data.tars.export import import_cache
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    started = time.perf_counter()
    with transfer_bar("importing", console) as progress:
        done = import_cache(tars, cache, progress)
    say_transfer(done, "read", time.perf_counter() - started, console)
    console.print(
        f"Wrote {cache}; `repa cache verify {cache}` checks it.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@contextmanager
def transfer_bar(doing: str, console: Console, unit: str = "shards") -> Iterator[Callable[[int, int], None]]:
    """Show a bar of shards, or of what else is counted, while the context lasts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bars:
        task = bars.add_task(doing, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def say_transfer(done: Transfer, verb: str, seconds: float, console: Console) -> None:
    """Print how much was moved, how fast, and what was there already."""
    from ...data.units import human_bytes

    kept = f", already there: {done.kept} of {counted(done.shards, 'shard')}" if done.kept else ""
    rate = f" ({human_bytes(done.bytes / seconds)}/s)" if done.bytes else ""
    console.print(
        f"{counted(done.images, 'image', ',')}, {human_bytes(done.bytes)} of columns {verb} in "
        f"{seconds:.1f} s{rate}{kept}",
        highlight=False,
        soft_wrap=True,
    )
