"""The end of a cache that several jobs have written, when every shard of every source is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CacheError
from ..format.captions import SOURCE_KIND, captions_path, has_captions
from ..format.columns import AUTOENCODER
from ..format.manifest import LATENTS_NOTE
from ..format.opening import open_manifest
from ..format.survey import survey
from ..units import counted
from ..writing.valid_rows import settle_all_valid
from .info import CacheInfo, cache_info
from .latent_statistics import settle_latent_statistics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from ..storage.bucket import CachePath

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """A cache that lacks nothing.

    Attributes:
        info: what it holds.
        latents: ``mean`` and ``std`` of each channel of the latents, over ``images``; None where a channel is
            constant, and for a cache without latents.
    """

    info: CacheInfo
    latents: Mapping[str, Any] | None


def seal_cache(path: CachePath) -> Sealed:
    """Settle what is known of a cache only when all of it is written. Nothing that is settled changes.

    Settled are the statistics of its latents, and the array that tells other Zarr readers the valid rows.

    Args:
        path: folder of the cache.

    Raises:
        CacheError: there is no cache, it has no source, shards are missing, or a commit record or a row of
            the latents is damaged.
        RepaError: the operating system refuses.
    """
    _settle_valid(path)
    if open_manifest(path).source_kind != SOURCE_KIND and has_captions(path):
        # they are a cache of their own
        _settle_valid(captions_path(path))
    settle_latent_statistics(path)
    info = cache_info(path)
    latents = info.manifest.sources.get(AUTOENCODER)
    return Sealed(info=info, latents=None if latents is None else latents.notes.get(LATENTS_NOTE))


def _settle_valid(path: CachePath) -> None:
    """Look for all shards, and have ``valid`` say what their records do.

    Raises:
        CacheError: see `seal_cache`.
    """
    manifest = open_manifest(path)
    if not manifest.sources:
        raise CacheError(f"cache {path} has no source", "write it by `repa preprocess`")
    found = survey(path, manifest)
    for error in found.damaged:
        raise error
    lacking = {source: absent for source, absent in found.absent.items() if absent}
    if lacking:
        parts = [
            f"{len(absent)} of {counted(manifest.num_shards, 'shard')} of {source} ({_ranges(absent)})"
            for source, absent in lacking.items()
        ]
        raise CacheError(
            f"cache {path} lacks {', '.join(parts)}",
            "run the `repa preprocess` that wrote it again, or wait for the jobs that still do, then seal it",
            field=next(iter(lacking)),
        )
    settle_all_valid(path, manifest)


def _ranges(shards: Iterable[int]) -> str:
    """Write ascending shards as ``--shards`` takes them, for example ``0:3, 7:8``."""
    runs: list[list[int]] = []
    for shard in shards:
        if runs and runs[-1][1] == shard:
            runs[-1][1] += 1
        else:
            runs.append([shard, shard + 1])
    shown = ", ".join(f"{first}:{end}" for first, end in runs[:_SHOWN])
    return f"{shown}, …" if len(runs) > _SHOWN else shown
