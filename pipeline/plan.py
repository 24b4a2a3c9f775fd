"""What a `repa preprocess` has left to do, in shards and bytes, before anything is loaded or written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..data.errors import CacheError, RepaError
from ..data.format.columns import AUTOENCODER, ColumnSpec, attention_source
from ..data.format.foreign import autoencoder_of, foreign_note
from ..data.format.layout import GROUP_FILE
from ..data.format.manifest import DEFAULT_SHARD_ROWS, ORIGINAL_VIEW, Manifest, Provenance
from ..data.format.opening import labels_sha256, open_manifest
from ..data.storage.files import os_errors
from ..data.storage.writable import file_in_the_way, free_bytes, refusing_folder
from ..data.units import human_bytes
from ..data.writing.store import ensure_cache, keys_sha256, refuse_foreign_folder
from .columns.specs import recorded_rank
from .config import check_flags
from .images.names import DEMO_DATA
from .shares import job_shards
from .source_plan import LEAST_RATIO, SourcePlan, missing_shards, plan_source, uncompressed_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..data.storage.bucket import CachePath
    from .config import PreprocessConfig
    from .images.base import ImageSource

CROP = "adm-center"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is left to do.

    Attributes:
        config: the command, nothing left open.
        images: the image source.
        manifest: what the cache is to be, sources left out.
        share: shards of this job.
        sources: what is left of each, of those shards.
        free_bytes: free on the disk of the cache; None: a bucket, which does not say.
    """

    config: PreprocessConfig
    images: ImageSource
    manifest: Manifest
    share: range
    sources: tuple[SourcePlan, ...]
    free_bytes: int | None

    @property
    def bytes(self) -> int:
        """What is to be written, at most."""
        return sum(source.bytes for source in self.sources)

    @property
    def rows(self) -> int:
        """Images to go through, each once."""
        shards = frozenset[int]().union(*(source.missing for source in self.sources))
        return sum(len(self.manifest.shard_range(shard)) for shard in shards)

    @property
    def fits(self) -> bool:
        """Whether there may be room for it."""
        least = sum(source.least_bytes for source in self.sources)
        return self.free_bytes is None or least <= self.free_bytes

    def require_room(self, beside: int = 0) -> None:
        """Refuse a disk that is too small or read-only, before a model is loaded or a row written.

        Of a bucket it is tried whether it takes an object.

        Args:
            beside: bytes that are to be written of captions.

        Raises:
            RepaError: which of the two, and what to do.
            CacheError: the store of a bucket cannot keep writers apart.
        """
        with os_errors("write", self.config.cache):
            folder = refusing_folder(self.config.cache)
        if folder is not None:
            raise RepaError(
                f"cannot write cache {self.config.cache}: folder {folder} is read-only for you",
                "name another folder with --cache",
            )
        least = sum(source.least_bytes for source in self.sources) + beside
        if self.free_bytes is not None and least > self.free_bytes:
            raise _too_small(self.config.cache, self.bytes + beside, self.free_bytes)


def require_room_for(
    cache: CachePath, manifest: Manifest, columns: Mapping[str, Mapping[str, ColumnSpec]], compressed: bool
) -> None:
    """Refuse a disk that is too small for what is left of some sources, now that their columns are known.

    Args:
        cache: folder of the cache.
        manifest: what it is to be.
        columns: source → name → spec.
        compressed: whether they will be.

    Raises:
        RepaError: what is to be written and what is free.
    """
    present = present_manifest(cache)
    needed = 0
    for source, specs in columns.items():
        missing = missing_shards(cache, present, source, range(manifest.num_shards))
        needed += uncompressed_bytes(manifest, missing, specs)
    free = free_bytes(cache)
    if free is not None and needed * (LEAST_RATIO if compressed else 1) > free:
        raise _too_small(cache, needed, free)


def _too_small(cache: CachePath, needed: int, free: int) -> RepaError:
    return RepaError(
        f"{human_bytes(needed)} are to be written to {cache}, its disk has {human_bytes(free)} free",
        "free some, name another disk with --cache, or take fewer images with --limit",
    )


def make_plan(config: PreprocessConfig) -> Plan:
    """Look at the images, the cache and the disk.

    Args:
        config: the command as asked for.

    Raises:
        RepaError: flags that contradict one another, images that cannot be listed, a teacher or a resolution
            that does not exist.
        CacheError: the cache is of something else, or a source of it was made in another way, or it has views
            that cannot be encoded here; the folder holds something else.
    """
    from .images.matched import MatchedImages
    from .images.open import open_source
    from .images.views import check_views

    check_flags(config)
    present = present_manifest(config.cache)
    if present is None:
        refuse_foreign_folder(config.cache)
    for encoder in config.encoders:
        if present is None or not {encoder, attention_source(encoder)} & present.sources.keys():
            config.teacher(encoder).require_resolution(config.resolution)
    imported = present is not None and foreign_note(present) is not None
    if present is not None and imported:
        _check_imported(config, present)
    config = _resolve(config, present)
    check_views(config.views or (), config.cache)
    images = open_source(
        config.data,
        limit=config.limit,
        apply_exif=config.apply_exif,
        class_names=config.class_names,
        labels=config.labels,
        may_import=True,
    )
    if present is not None and imported:
        images = MatchedImages(images, config.cache, present)
    manifest = _manifest_of(config, images, present)
    if present is not None:
        # nothing is written for a cache that is there: this only compares
        ensure_cache(config.cache, manifest, images.keys, images.labels)
    share = job_shards(config.shards, manifest.num_shards)
    sources = tuple(plan_source(config, manifest, present, source, share) for source in config.sources)
    return Plan(
        config=config,
        images=images,
        manifest=manifest,
        share=share,
        sources=sources,
        free_bytes=free_bytes(config.cache),
    )


def _manifest_of(config: PreprocessConfig, images: ImageSource, present: Manifest | None) -> Manifest:
    """Return the manifest of a cache of the images, without columns."""
    return Manifest(
        num_rows=len(images),
        shard_rows=config.shard_rows or DEFAULT_SHARD_ROWS,
        resolution=config.resolution,
        crop=CROP,
        views=config.views or (ORIGINAL_VIEW,),
        exif_orientation="applied" if config.apply_exif else "ignored",
        source_kind=images.kind,
        source_fingerprint=images.fingerprint,
        keys_sha256=keys_sha256(images.keys),
        labels_sha256=labels_sha256(images.labels),
        class_names=_class_names(images, present),
    )


def _check_imported(config: PreprocessConfig, present: Manifest) -> None:
    """Refuse to encode latents into a cache whose latents another program encoded.

    Raises:
        CacheError: the import is not complete, or the command names an autoencoder.
    """
    known = present.sources[AUTOENCODER]
    missing = missing_shards(config.cache, present, AUTOENCODER, range(present.num_shards))
    if missing:
        raise CacheError(
            f"cache {config.cache} lacks {len(missing)} of {present.num_shards} shards of imported latents",
            "run the same `repa cache import` again first, which goes on or mends them",
            field=AUTOENCODER,
        )
    if config.vae is not None and config.vae != autoencoder_of(known):
        raise CacheError(
            f"--vae {config.vae} would encode, and the latents of cache {config.cache} were imported",
            "leave it out, or write another cache with --cache",
            field="--vae",
        )


def _class_names(images: ImageSource, present: Manifest | None) -> tuple[str, ...]:
    """Return the names of the classes, those of the cache where only a folder's own name is another.

    The one class of a flat folder is called after the folder, which may have been renamed since.
    """
    names = tuple(images.class_names)
    if present is not None and images.kind == present.source_kind == "folder":
        flat = len(names) == len(present.class_names) == 1 and not any("/" in key for key in images.keys)
        return present.class_names if flat else names
    return names


def present_manifest(cache: CachePath) -> Manifest | None:
    """Read the manifest of the cache, or None when nothing is there yet.

    Raises:
        CacheError: a file stands there or in its way, or a cache that cannot be read.
    """
    if (file := file_in_the_way(cache)) is not None:
        raise CacheError(f"{file} is a file, not a folder", "choose another folder with --cache")
    with os_errors("read", cache):
        there = (cache / GROUP_FILE).exists()
    return open_manifest(cache) if there else None


def imported_resolution(cache: CachePath | None) -> int | None:
    """Return the side of the images whose latents were imported into a cache, None of any other.

    Raises:
        CacheError: a file stands there, or a cache that cannot be read.
    """
    present = None if cache is None else present_manifest(cache)
    return present.resolution if present is not None and foreign_note(present) is not None else None


def _resolve(config: PreprocessConfig, present: Manifest | None) -> PreprocessConfig:
    """Fill in what was left open, as the cache has it, else by the default."""
    recorded = present.sources if present is not None else {}
    vae = config.vae
    if vae is None and AUTOENCODER in recorded:
        vae = autoencoder_of(recorded[AUTOENCODER])
    batch_size = config.batch_size
    if batch_size is None:
        known = [
            recorded[source].batch_size
            for source in (*config.sources[1:], *recorded)
            if source in recorded and recorded[source].batch_size
        ]
        batch_size = known[0] if known else default_batch_size(config.resolution)
    shard_rows = config.shard_rows
    if shard_rows is None:
        shard_rows = present.shard_rows if present is not None else DEFAULT_SHARD_ROWS
    views = config.views or ((ORIGINAL_VIEW,) if present is None else present.views)
    if vae is None:
        from .encoders.vae import DEFAULT_VAE

        vae = DEMO_DATA if config.data == DEMO_DATA else DEFAULT_VAE
    return replace(
        config,
        vae=vae,
        batch_size=batch_size,
        shard_rows=shard_rows,
        views=views,
        attention_rank=_attention_rank(config, recorded),
    )


def _attention_rank(config: PreprocessConfig, recorded: Mapping[str, Provenance]) -> int | None:
    """Return the rank asked for, or the one that an earlier version chose for this very tolerance."""
    if config.attention_kl is None:
        return config.attention_rank
    for encoder in config.attention:
        known = recorded.get(attention_source(encoder))
        if known is not None and known.notes.get("tolerance") == config.attention_kl:
            return recorded_rank(known.notes)
    return None


def default_batch_size(resolution: int) -> int:
    """Choose as many images as take the memory of 32 images of 256×256 on a GPU, or of 8 on a CPU.

    They are at most 64.

    A CPU computes as many batches at a time as it has cores, see `lanes`.
    """
    import torch

    images = 32 if torch.cuda.is_available() else 8
    return max(1, min(64, images * 256**2 // resolution**2))
