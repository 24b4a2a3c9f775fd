"""Encoding again what `repa cache verify` found bad, exactly as it was encoded.

Every model is loaded and held against the manifest before anything of its source is withdrawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.errors import CacheError
from ...data.format.columns import AUTOENCODER
from ...data.format.commits import read_commit
from ...data.format.foreign import foreign_note
from ...data.format.layout import commit_file
from ...data.format.opening import open_manifest
from ...data.units import counted
from ...data.upkeep.repair import restore_documents, restore_tables, withdraw
from ..shard_loop.interrupts import terminated_as_interrupt
from ..shard_loop.worker import Tally, write_columns
from ..source_plan import missing_shards
from .recorded import recorded_config, recorded_images, recorded_job, recorded_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ...data.format.manifest import Manifest
    from ...data.storage.bucket import CachePath
    from ...data.upkeep.repair import RepairPlan
    from ..images.base import ImageSource
    from .recorded import Given

    Report = Callable[[str, int, int], None]
    Written = Callable[[Mapping[str, int], int], None]


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What became of one source.

    Attributes:
        source: its name.
        shards: shards written again.
        as_committed: those of them whose bytes are the ones that had been committed.
        other: those whose bytes are not: another device or library, or an image of the same size.
        unknown: those whose commit record was lost, so that nothing tells.
    """

    source: str
    shards: tuple[int, ...]
    as_committed: tuple[int, ...]
    other: tuple[int, ...]
    unknown: tuple[int, ...]


def repair(cache: CachePath, plan: RepairPlan, given: Given, report: Report) -> list[Repaired]:
    """Make a cache what its manifest says.

    Args:
        cache: its folder.
        plan: what is to be done, of `plan_repair`.
        given: where images and weights lie.
        report: called with the source, and its images written and to write.

    Returns:
        What was encoded again, source by source.

    Raises:
        RepaError: images or weights that cannot be had, a disk that refuses.
        CacheError: other images, weights or forms than the recorded ones, that source is as it was; or
            imported latents, which nothing can encode.
    """
    restore_documents(cache, plan)
    manifest = open_manifest(cache)
    imported = foreign_note(manifest) is not None
    if imported and (plan.tables or AUTOENCODER in plan.shards):
        what = f"{counted(len(plan.shards.get(AUTOENCODER, ())), 'shard')} of imported latents"
        raise CacheError(
            f"{what if not plan.tables else 'keys or labels of imported latents'} of cache {cache} cannot be "
            "encoded again",
            "run the same `repa cache import` again, which writes them anew from its files, and then repair "
            "the rest",
            field=AUTOENCODER,
        )
    if not plan.needs_images:
        return []
    images = recorded_images(cache, manifest, given)
    if plan.tables:
        restore_tables(cache, manifest, images.keys, images.labels)
    with terminated_as_interrupt():
        return [
            _repair_source(cache, manifest, source, plan.shards.get(source, ()), images, given, report)
            for source in plan.sources
        ]


def _repair_source(
    cache: CachePath,
    manifest: Manifest,
    source: str,
    bad: Sequence[int],
    images: ImageSource,
    given: Given,
    report: Report,
) -> Repaired:
    job = recorded_job(recorded_config(cache, manifest, source, given), manifest, images)
    model = recorded_model(job, manifest, source, images)

    def write(missing: Sequence[int], written: Written) -> None:
        write_columns(job, images, [model], {source: missing}, written, Tally())

    return rewrite(cache, manifest, source, bad, write, report)


def rewrite(
    cache: CachePath,
    manifest: Manifest,
    source: str,
    bad: Sequence[int],
    write: Callable[[Sequence[int], Written], None],
    report: Report,
) -> Repaired:
    """Take back shards of a source and have them written again, with all that are missing.

    Args:
        cache: folder of the cache, or of its captions.
        manifest: its manifest.
        source: the source.
        bad: shards to take back.
        write: given the shards to write, and what to call with the rows that were written.
        report: see `repair`.

    Returns:
        What became of it.

    Raises:
        RepaError: the shards cannot be written.
    """
    before = {shard: _record(cache, source, shard) for shard in bad}
    withdraw(cache, manifest, {source: bad})
    missing = missing_shards(cache, manifest, source, range(manifest.num_shards))
    total = sum(len(manifest.shard_range(shard)) for shard in missing)
    done = 0

    def written(_: Mapping[str, int], count: int) -> None:
        nonlocal done
        done += count
        report(source, done, total)

    report(source, 0, total)
    if missing:
        write(missing, written)
    same = {
        shard: record == _record(cache, source, shard)
        for shard, record in before.items()
        if record is not None
    }
    return Repaired(
        source=source,
        shards=tuple(missing),
        as_committed=tuple(shard for shard, equal in same.items() if equal),
        other=tuple(shard for shard, equal in same.items() if not equal),
        unknown=tuple(shard for shard in missing if shard not in same),
    )


def _record(cache: CachePath, source: str, shard: int) -> bytes | None:
    """Return the bytes of a commit record that is intact. They say what the shard's files hold."""
    try:
        known = read_commit(cache, source, shard)
    except CacheError:
        return None
    return None if known is None else commit_file(cache, source, shard).read_bytes()
