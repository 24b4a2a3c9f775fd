"""`repa cache upgrade` gives a cache what earlier versions did not write, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...pipeline.images.names import default_cache

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


def upgrade(*, cache: str | Path | None = None, console: Console | None = None) -> None:
    """Bring a cache to today's format version, and measure its latents where nobody has.

    The same command again goes on where it was stopped.

    Args:
        cache: folder of the cache, or its address in a bucket; by default the only one under ``caches/``.
        console: where to print; standard output by default.

    Raises:
        CacheError: there is no cache, a process writes it, or something in it is damaged.
        RepaError: the operating system refuses.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    from ...data.edge import printable
    from ...data.format.manifest import FORMAT_VERSION
    from ...data.storage.bucket import cache_path
    from ...data.upkeep.latent_statistics import settle_latent_statistics
    from ...data.upkeep.upgrade import upgrade_cache

    console = console or Console()
    path = cache_path(cache or default_cache())
    bars = Progress(
        TextColumn("upgrading"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bars:
        task = bars.add_task("upgrading", total=None)

        def progress(done: int, of: int) -> None:
            bars.update(task, completed=done, total=of)

        changed = upgrade_cache(path, progress)
        measured = settle_latent_statistics(path)
    if measured:
        console.print("measured mean and standard deviation of its latents", highlight=False)
    what = "is now" if changed else "is already"
    console.print(Text(f"{printable(path)} {what} of format version {FORMAT_VERSION}"), soft_wrap=True)
