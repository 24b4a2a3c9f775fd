"""`repa cache seal` finishes a cache that several jobs wrote."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ...pipeline.images.names import default_cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

_SHOWN = 10


def seal(*, cache: str | None = None, console: Console | None = None) -> None:
    """Check that nothing is missing, settle what only a whole cache can, and print its counts and statistics.

    The same command again changes nothing and prints the same.

    Args:
        cache: folder of the cache, or its address in a bucket; by default the only one under ``caches/``.
        console: where to print; standard output by default.

    Raises:
        CacheError: there is no cache, shards are missing, or something in it is damaged.
        RepaError: the operating system refuses.
    """
    from rich.text import Text

    from ...data.edge import printable
    from ...data.storage.bucket import cache_path
    from ...data.units import counted, human_bytes
    from ...data.upkeep.seal import seal_cache
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    path = cache_path(cache or default_cache())
    sealed = seal_cache(path)
    info = sealed.info
    lines = [
        f"{printable(path)} is complete: {counted(info.num_rows, 'image', ',')}, {info.valid_rows:,} of them "
        f"valid, in {counted(info.num_classes, 'class')}; {counted(info.num_shards, 'shard')} of each source"
    ]
    for source in info.sources:
        size = human_bytes(sum(column.file_bytes for column in source.columns))
        columns = ", ".join(column.name for column in source.columns)
        lines.append(f"  {source.name}: {size} in {columns}")
    reasons = Counter(info.invalid.values())
    lines += [f"  left out: {count} × {printable(reason)}" for reason, count in reasons.most_common(_SHOWN)]
    if sealed.latents is not None:
        images = counted(sealed.latents["images"], "image", ",")
        mean, std = _numbers(sealed.latents["mean"]), _numbers(sealed.latents["std"])
        lines.append(f"  latents of {images}: mean {mean}; standard deviation {std}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
