"""Foreign latents into a cache, shard by shard, each there whole or not at all.

All files are read twice: once for their checksums and for what could be wrong with them, before anything is
written, and once for their rows. So what stops an import stops it at the beginning, and what is resumed comes
from the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.format.columns import AUTOENCODER, MOMENTS, ColumnSpec
from ...data.format.commits import is_committed
from ...data.format.manifest import (
    DEFAULT_SHARD_ROWS,
    FOREIGN_NOTE,
    UNKNOWN_DTYPE,
    Manifest,
    Provenance,
)
from ...data.format.opening import labels_sha256
from ...data.tars.export import Transfer
from ...data.upkeep.latent_statistics import settle_latent_statistics
from ...data.upkeep.repair import restore_tables, withdraw
from ...data.upkeep.verify import verify_cache
from ...data.writing.store import ensure_cache, ensure_source, keys_sha256
from ...data.writing.writer import SourceWriter
from ..encoders.weights import library_versions
from ..images.listing import fingerprint_of
from ..plan import CROP, present_manifest, require_room_for
from ..run import StoppedError
from ..shard_loop.interrupts import terminated_as_interrupt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .base import ForeignLatents

    Progress = Callable[[int, int], None]

_ROWS = 64  # read at a time
_FILES = 1024  # looked at before more are handed out
_MOST_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What an import makes of foreign latents.

    Attributes:
        vae: hub name or folder of the autoencoder, as its user says; None names none.
        resolution: side of the images in pixels; None: as the layout's autoencoder makes such latents of.
        shard_rows: rows of a shard.
    """

    vae: str | None = None
    resolution: int | None = None
    shard_rows: int = DEFAULT_SHARD_ROWS


def import_latents(
    latents: ForeignLatents, path: Path, settings: ImportSettings, surveyed: Progress, written: Progress
) -> Transfer:
    """Write foreign latents as a cache. Called again, it goes on; a complete cache is checked and mended.

    Args:
        latents: the latents.
        path: folder of the cache.
        settings: see `ImportSettings`.
        surveyed: called with files looked at and files in all.
        written: called with shards written and shards in all.

    Returns:
        What was done.

    Raises:
        RepaError: a file is not as its layout says, the disk is too small or refuses.
        CacheError: another cache is there, or one of other files.
        StoppedError: stopped from outside; committed shards stay.
    """
    manifest = _manifest_of(latents, settings)
    columns = {MOMENTS: ColumnSpec(shape=latents.shape, dtype="float32")}
    require_room_for(path, manifest, {AUTOENCODER: columns}, compressed=False)
    with terminated_as_interrupt():
        try:
            note = _survey(latents, surveyed)
            manifest = _declare(
                latents, path, manifest, _provenance(latents, manifest, settings, note), columns
            )
            done = _write(latents, path, manifest, written)
            settle_latent_statistics(path)
        except KeyboardInterrupt:
            raise StoppedError(
                f"interrupted: the committed shards are saved in {path}; the same command resumes"
            ) from None
    return done


def _manifest_of(latents: ForeignLatents, settings: ImportSettings) -> Manifest:
    return Manifest(
        num_rows=len(latents.keys),
        views=latents.views,
        shard_rows=settings.shard_rows,
        resolution=_resolution(latents, settings.resolution),
        crop=CROP,
        exif_orientation="ignored",
        source_kind=f"{latents.layout} import",
        source_fingerprint=fingerprint_of(latents.keys, latents.labels, latents.sizes),
        keys_sha256=keys_sha256(latents.keys),
        labels_sha256=labels_sha256(latents.labels),
        class_names=tuple(latents.class_names),
    )


def _resolution(latents: ForeignLatents, asked: int | None) -> int:
    """Return the side of the images.

    Raises:
        RepaError: it is no multiple of the latent's side, or nothing says it.
    """
    side = latents.shape[1]
    if asked is None:
        return side * latents.factor
    if asked % side or not 1 <= asked <= 2**16:
        raise RepaError(
            f"--resolution {asked} is no multiple of the latents' side {side}",
            f"give the side of the images in pixels, as {side * latents.factor}",
            field="--resolution",
        )
    return asked


def _survey(latents: ForeignLatents, progress: Progress) -> dict[str, object]:
    """Look at every file and return the note of where the latents came from."""
    lines = []
    count = len(latents.files)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "repa-import") as pool:
        try:
            for first in range(0, count, _FILES):
                names = latents.files[first : first + _FILES]
                for name, digest in zip(names, pool.map(latents.survey, names), strict=True):
                    lines.append(f"{digest}  {name}\n")
                    progress(len(lines), count)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {
        "layout": latents.layout,
        "latents": latents.latents,
        "mirrored": latents.mirrored,
        "files": count,
        "bytes": sum(latents.place.sizes[name] for name in latents.files),
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def _provenance(
    latents: ForeignLatents, manifest: Manifest, settings: ImportSettings, note: dict[str, object]
) -> Provenance:
    """Return what is known of the autoencoder, and nothing else."""
    named = {} if settings.vae is None else {"location": settings.vae}
    return Provenance(
        model=settings.vae or "unknown",
        weights_sha256="",
        random_weights=False,
        input_size=manifest.resolution,
        mean=(),
        std=(),
        compute_dtype=UNKNOWN_DTYPE,
        batch_size=0,
        grid=(latents.shape[1], latents.shape[2]),
        libraries=library_versions(),
        notes={**latents.scale.notes(), **named, FOREIGN_NOTE: note},
    )


def _declare(
    latents: ForeignLatents,
    path: Path,
    manifest: Manifest,
    provenance: Provenance,
    columns: dict[str, ColumnSpec],
) -> Manifest:
    """Make the cache with its keys and labels and declare the latents, or check that they are these."""
    present = present_manifest(path)
    if present is not None and present.identity == manifest.identity:
        restore_tables(path, present, latents.keys, latents.labels)
    ensure_cache(path, manifest, latents.keys, latents.labels)
    return ensure_source(path, AUTOENCODER, provenance, columns)


def _write(latents: ForeignLatents, path: Path, manifest: Manifest, progress: Progress) -> Transfer:
    shards = range(manifest.num_shards)
    if all(is_committed(path, manifest, AUTOENCODER, shard) for shard in shards):
        # a cache that is complete is imported again to mend it
        found = {each.shard for each in verify_cache(path, (MOMENTS,)) if each.shard is not None}
        withdraw(path, manifest, {AUTOENCODER: sorted(found)})
    images = kept = 0
    with (
        SourceWriter(path, manifest, AUTOENCODER, shards) as writer,
        ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "repa-import") as pool,
    ):
        remaining = frozenset(writer.remaining)
        for shard in shards:
            if shard in remaining:
                with writer.shard(shard) as file:
                    for first in range(file.rows.start, file.rows.stop, _ROWS):
                        rows = range(first, min(first + _ROWS, file.rows.stop))
                        for row, moments in zip(rows, pool.map(latents.read, rows), strict=True):
                            file.write(row, MOMENTS, moments)
                    file.commit()
                images += len(manifest.shard_range(shard))
            else:
                kept += 1
            progress(shard + 1, len(shards))
    row_bytes = manifest.columns[MOMENTS].row_bytes * len(manifest.views)
    return Transfer(shards=len(shards), kept=kept, images=images, bytes=images * row_bytes)
