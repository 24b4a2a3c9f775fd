"""Joining caches of parts of one image set into the cache of the whole.

What is stored of an image depends on nothing but the image, the models and the settings, so rows can be
copied from where they are. For caches from a folder the rows of the whole are sorted by key, as if all had
been encoded at once; the parts of anything else follow one another. Nothing is encoded, every row's checksum
is checked on the way, and what was interrupted is resumed by the same call.

On some CPUs (see `pipeline.lanes`) and on GPUs the last bits of a feature depend on the image's position in
its batch. There the rows are those of the parts, and not quite those of a cache made at once.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CacheError, RepaError
from ..format.commits import is_committed
from ..format.layout import calibration_file
from ..format.manifest import FORMAT_VERSION, LATENTS_NOTE
from ..format.opening import labels_sha256, open_manifest
from ..format.survey import invalid_reasons
from ..reading.reader import CacheReader
from ..units import human_bytes
from ..writing.calibrations import check_calibration, ensure_calibration, read_calibration, recorded_sha256
from ..writing.store import ensure_cache, ensure_source, keys_sha256
from ..writing.writer import SourceWriter
from .latent_statistics import settle_latent_statistics
from .parts import check_alike, check_source, chosen_sources, origins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..format.manifest import Manifest
    from ..writing.writer import ShardWriter
    from .parts import ImageSet, Part

    Progress = Callable[[int, int], None]

_AT_ONCE = 32 * 2**20  # bytes of a column that are held while they are copied
_THREADS = 4


def merge_caches(
    parts: Sequence[Part],
    out: Path,
    images: ImageSet,
    *,
    sources: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the cache of the whole.

    Args:
        parts: at least two complete caches of different images of one set.
        out: folder of the whole; what is there of it already is kept.
        images: of the whole: those of all parts.
        sources: what to join; by default every source of the first part.
        progress: called with rows copied and rows in all, each counted once a source.

    Returns:
        The manifest of the whole.

    Raises:
        CacheError: the parts do not fit together, or not the images; a part is not complete; ``out`` is
            another cache.
        CorruptRowError: a row of a part is damaged.
        RepaError: the disk is full, or refuses.
    """
    if len(parts) < 2:
        raise CacheError("one cache needs no joining", "name at least two")
    if out.resolve() in {part.path.resolve() for part in parts}:
        raise CacheError(f"{out} is one of the parts", "choose another folder for the whole with --cache")
    check_alike(parts)
    chosen = chosen_sources(parts, sources)
    for source in chosen:
        check_source(parts, source, chosen)
    origin = origins(parts, images)
    first = parts[0].manifest
    manifest = ensure_cache(out, _manifest_of(images, first), images.keys, images.labels)
    with ExitStack() as stack:
        columns = [name for source in chosen for name in first.source_columns(source)]
        readers = [stack.enter_context(CacheReader(part.path, columns)) for part in parts]
        copier = _Copier(out, parts, readers, origin, stack.enter_context(ThreadPoolExecutor(_THREADS)))
        for source in chosen:
            _copy_calibration(parts[0], out, source)
            provenance = first.sources[source]
            # of that part's latents alone
            notes = {name: note for name, note in provenance.notes.items() if name != LATENTS_NOTE}
            provenance = replace(provenance, notes=notes)
            manifest = ensure_source(out, source, provenance, first.source_columns(source))
        _check_room(out, manifest, chosen)
        done, total = 0, manifest.num_rows * len(chosen)
        for source in chosen:
            for rows in copier.copy(manifest, source):
                done += rows
                if progress is not None:
                    progress(done, total)
    return open_manifest(out) if settle_latent_statistics(out) else manifest


def _manifest_of(images: ImageSet, part: Manifest) -> Manifest:
    """Make the manifest of the whole before anything is joined.

    The rows are those of the images, the rest is as of a part.
    """
    return replace(
        part,
        num_rows=len(images.keys),
        source_fingerprint=images.fingerprint,
        keys_sha256=keys_sha256(images.keys),
        labels_sha256=labels_sha256(images.labels),
        format_version=FORMAT_VERSION,
        class_names=images.class_names,
        columns={},
        sources={},
    )


def _copy_calibration(part: Part, out: Path, source: str) -> None:
    """Hand on the calibration that parts share."""
    recorded = recorded_sha256(part.manifest.sources[source])
    if recorded is None:
        return
    data = read_calibration(part.path, source)
    if data is None:
        raise CacheError(
            f"{calibration_file(part.path, source)} is missing", "mend that part with `repa cache repair`"
        )
    check_calibration(calibration_file(part.path, source), data, recorded)
    ensure_calibration(out, source, lambda: data, usable=data.__eq__)


def _check_room(out: Path, manifest: Manifest, sources: Sequence[str]) -> None:
    """Refuse a disk that the shards that are not there yet would fill."""
    needed = 0
    for source in sources:
        row_bytes = sum(spec.row_bytes for spec in manifest.source_columns(source).values())
        rows = sum(
            len(manifest.shard_range(shard))
            for shard in range(manifest.num_shards)
            if not is_committed(out, manifest, source, shard)
        )
        packed = any(spec.compressor for spec in manifest.source_columns(source).values())
        # how far a source is compressed shows when it is written
        needed += 0 if packed else rows * row_bytes * len(manifest.views)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise RepaError(
            f"{human_bytes(needed)} are to be copied to {out}, its disk has {human_bytes(free)} free",
            "free some, or name another disk with --cache",
        )


class _Copier:
    """Copies shards of the whole, row by row from where they are.

    Args:
        out: folder of the whole.
        parts: the parts.
        readers: of each.
        origin: part and row of every row of the whole.
        pool: reads.
    """

    def __init__(
        self,
        out: Path,
        parts: Sequence[Part],
        readers: Sequence[CacheReader],
        origin: NDArray[np.int64],
        pool: ThreadPoolExecutor,
    ) -> None:
        self._out = out
        self._readers = readers
        self._origin = origin
        self._pool = pool
        self._reasons = [invalid_reasons(part.path, part.manifest) for part in parts]

    def copy(self, manifest: Manifest, source: str) -> Iterator[int]:
        """Write the shards of a source that are not there. It yields rows done, shard by shard."""
        with SourceWriter(self._out, manifest, source, range(manifest.num_shards)) as writer:
            remaining = frozenset(writer.remaining)
            for number in writer.shards:
                if number in remaining:
                    with writer.shard(number) as shard:
                        self._copy_shard(manifest, source, shard)
                        shard.commit()
                yield len(manifest.shard_range(number))

    def _copy_shard(self, manifest: Manifest, source: str, shard: ShardWriter) -> None:
        valid = []
        for row in shard.rows:
            number, there = self._origin[row].tolist()
            # rows that any source of a part lacks are invalid in the part as a whole
            reason = self._reasons[number].get(there)
            if reason is None:
                valid.append(row)
            else:
                shard.mark_invalid(row, reason)
        views = len(manifest.views)
        for column, spec in manifest.source_columns(source).items():
            step = max(1, _AT_ONCE // (spec.row_bytes * views))
            for start in range(0, len(valid), step):
                rows = valid[start : start + step]
                for row, values in zip(rows, self._read(rows, column, manifest), strict=True):
                    shard.write(row, column, values)

    def _read(self, rows: Sequence[int], column: str, manifest: Manifest) -> NDArray[Any]:
        """Read rows of the whole ``[B, V, *shape]``, each from its part."""
        spec = manifest.columns[column]
        out = np.empty((len(rows), len(manifest.views), *spec.shape), dtype=spec.numpy_dtype)
        origin = self._origin[rows]
        for number, reader in enumerate(self._readers):
            here = np.flatnonzero(origin[:, 0] == number)
            if not len(here):
                continue
            values = np.empty((len(here), *spec.shape), dtype=spec.numpy_dtype)
            for view in range(len(manifest.views)):
                reader.read_rows(
                    origin[here, 1],
                    [column],
                    {column: values},
                    views=np.full(len(here), view, dtype=np.int64),
                    pool=self._pool,
                    parts=_THREADS,
                )
                out[here, view] = values
        return out
