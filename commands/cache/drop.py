"""`repa cache drop` takes a source and its columns out of a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...pipeline.images.names import default_cache

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


def drop(
    *,
    source: str,
    cache: str | Path | None = None,
    autoencoder: bool = False,
    console: Console | None = None,
) -> None:
    """Remove a source. The same command again finishes what was killed.

    Args:
        source: name of the source.
        cache: folder of the cache, or its address in a bucket; by default the only one under ``caches/``.
        autoencoder: whether the autoencoder's may be removed.
        console: where to print; standard output by default.

    Raises:
        CacheError: there is no such source, it is the autoencoder's, or a process is writing it.
        RepaError: the operating system refuses.
    """
    from rich.text import Text

    from ...data.storage.bucket import cache_path
    from ...data.units import human_bytes
    from ...data.upkeep.drop import drop_source
    from ...data.upkeep.info import folder_bytes
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    path = cache_path(cache or default_cache())
    before = folder_bytes(path)
    manifest = drop_source(path, source, autoencoder=autoencoder)
    freed = human_bytes(before - folder_bytes(path))
    left = ", ".join(manifest.sources) or "no source"
    console.print(Text(f"{path}: {source} is gone, {freed} are free again; it has {left}"), soft_wrap=True)
