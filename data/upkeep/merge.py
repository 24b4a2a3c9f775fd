"""Joining caches of parts of one image set into the cache of the whole.

What is stored of an image depends on nothing but the image, the models and the settings, so rows can be
copied from where they are. For caches from a folder the rows of the whole are sorted by key, as if all had
been encoded at once; the parts of anything else follow one another. Nothing is encoded, every row's checksum
is checked on the way, and what was interrupted is resumed by the same call.

On some CPUs (see `pipeline.lanes`) and on GPUs the last bits of a feature depend on the image's position in
its batch. There the rows are those of the parts, and not quite those of a cache made at once.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import CacheError
from ..format.layout import calibration_file
from ..format.manifest import FORMAT_VERSION, LATENTS_NOTE
from ..format.opening import labels_sha256, open_manifest
from ..reading.reader import CacheReader
from ..writing.calibrations import check_calibration, ensure_calibration, read_calibration, recorded_sha256
from ..writing.store import ensure_cache, ensure_source, keys_sha256
from .captioned_parts import captioned_parts, merge_captions
from .copier import COPY_THREADS, RowCopier, check_room
from .latent_statistics import settle_latent_statistics
from .parts import check_alike, check_source, chosen_sources, origins

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..format.manifest import Manifest
    from .parts import ImageSet, Part

    Progress = Callable[[int, int], None]


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
        sources: what to join; by default every source of the first part, and the captions with theirs.
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
    text = captioned_parts(parts, sources)
    if text is not None and sources is not None:
        sources = [source for source in sources if source not in text.sources]
    chosen = chosen_sources(parts, sources)
    for source in chosen:
        check_source(parts, source, chosen)
    origin = origins(parts, images)
    first = parts[0].manifest
    manifest = ensure_cache(out, _manifest_of(images, first), images.keys, images.labels)
    with ExitStack() as stack:
        columns = [name for source in chosen for name in first.source_columns(source)]
        readers = [stack.enter_context(CacheReader(part.path, columns)) for part in parts]
        copier = RowCopier(out, parts, readers, origin, stack.enter_context(ThreadPoolExecutor(COPY_THREADS)))
        for source in chosen:
            _copy_calibration(parts[0], out, source)
            provenance = first.sources[source]
            # of that part's latents alone
            notes = {name: note for name, note in provenance.notes.items() if name != LATENTS_NOTE}
            provenance = replace(provenance, notes=notes)
            manifest = ensure_source(out, source, provenance, first.source_columns(source))
        check_room(out, manifest, chosen)
        done, total = 0, manifest.num_rows * len(chosen)
        for source in chosen:
            for rows in copier.copy(manifest, source):
                done += rows
                if progress is not None:
                    progress(done, total)
    if text is not None:
        merge_captions(text, out, origin)
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
