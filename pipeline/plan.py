"""What a `repa preprocess` has left to do, in shards and bytes, before anything is loaded or written."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..data.errors import CacheError, RepaError
from ..data.format.columns import AUTOENCODER, MOMENTS, ColumnSpec, attention_source, column_name, model_of
from ..data.format.commits import is_committed
from ..data.format.factor_layout import FactorLayout
from ..data.format.foreign import autoencoder_of, foreign_note
from ..data.format.manifest import DEFAULT_SHARD_ROWS, ORIGINAL_VIEW, Manifest, Provenance
from ..data.format.opening import labels_sha256, open_manifest
from ..data.format.shard_index import index_bytes
from ..data.storage.files import nearest_folder
from ..data.storage.local import CHECKSUM_BYTES
from ..data.units import human_bytes
from ..data.writing.store import ensure_cache, keys_sha256, refuse_foreign_folder
from .columns.specs import (
    attention_columns,
    describe_attention,
    factored_columns,
    recorded_rank,
    token_columns,
)
from .config import check_flags
from .images.names import DEMO_DATA

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from .columns.specs import AttentionSettings
    from .config import PreprocessConfig
    from .images.base import ImageSource

CROP = "adm-center"
_LEAST_RATIO = 0.5  # no lossless compressor halves features


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """What is left to do of one source.

    Attributes:
        source: its name.
        columns: its columns, name → spec.
        missing: shards that are not committed.
        rows: images of those shards.
        bytes: what writing them will take at most, checksums and indexes included: before compression, and at
            the most components of attention whose form is yet to be chosen.
        least_bytes: what it will take at least.
        at_most: whether that form is yet to be chosen; columns are of the largest then.
        declared: what the cache says of it already, or None.
        drawn: whether its weights are drawn, not trained.
    """

    source: str
    columns: Mapping[str, ColumnSpec]
    missing: tuple[int, ...]
    rows: int
    bytes: int
    least_bytes: int
    at_most: bool
    declared: Provenance | None
    drawn: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is left to do.

    Attributes:
        config: the command, nothing left open.
        images: the image source.
        manifest: what the cache is to be, sources left out.
        sources: what is left of each.
        free_bytes: free on the disk of the cache.
    """

    config: PreprocessConfig
    images: ImageSource
    manifest: Manifest
    sources: tuple[SourcePlan, ...]
    free_bytes: int

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
        """Whether the disk may have room for it."""
        return sum(source.least_bytes for source in self.sources) <= self.free_bytes

    def require_room(self) -> None:
        """Refuse a disk that is too small or read-only, before a model is loaded or a byte written.

        Raises:
            RepaError: which of the two, and what to do.
        """
        folder = nearest_folder(self.config.cache)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RepaError(
                f"cannot write cache {self.config.cache}: folder {folder} is read-only for you",
                "name another folder with --cache",
            )
        if not self.fits:
            raise _too_small(self.config.cache, self.bytes, self.free_bytes)


def require_room_for(
    cache: Path, manifest: Manifest, columns: Mapping[str, Mapping[str, ColumnSpec]], compressed: bool
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
        needed += _bytes(manifest, missing, specs)
    free = shutil.disk_usage(nearest_folder(cache)).free
    if needed * (_LEAST_RATIO if compressed else 1) > free:
        raise _too_small(cache, needed, free)


def _too_small(cache: Path, needed: int, free: int) -> RepaError:
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
    manifest = Manifest(
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
    if present is not None:
        # nothing is written for a cache that is there: this only compares
        ensure_cache(config.cache, manifest, images.keys, images.labels)
    sources = tuple(_plan_source(config, manifest, present, source) for source in config.sources)
    free = shutil.disk_usage(nearest_folder(config.cache)).free
    return Plan(config=config, images=images, manifest=manifest, sources=sources, free_bytes=free)


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


def present_manifest(cache: Path) -> Manifest | None:
    """Read the manifest of the cache, or None when nothing is there yet.

    Raises:
        CacheError: a file stands there or in its way, or a cache that cannot be read.
    """
    for each in (cache, *cache.parents):
        if each.exists() and not each.is_dir():
            raise CacheError(f"{each} is a file, not a folder", "choose another folder with --cache")
    return open_manifest(cache) if (cache / "zarr.json").exists() else None


def missing_shards(
    cache: Path, present: Manifest | None, source: str, shards: Iterable[int]
) -> tuple[int, ...]:
    """List those of ``shards`` that a source has not committed. They are all when the cache does not know it.

    Args:
        cache: folder of the cache.
        present: its manifest on disk.
        source: name of the source.
        shards: the shards to look at.
    """
    if present is None or source not in present.sources:
        return tuple(shards)
    return tuple(shard for shard in shards if not is_committed(cache, present, source, shard))


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


def _plan_source(
    config: PreprocessConfig, manifest: Manifest, present: Manifest | None, source: str
) -> SourcePlan:
    declared = present.sources.get(source) if present is not None else None
    known = present.source_columns(source) if present is not None else {}
    missing = missing_shards(config.cache, present, source, range(manifest.num_shards))
    begun = declared is not None and len(missing) < manifest.num_shards
    at_most = False
    if source == AUTOENCODER and begun and not missing:
        # the autoencoder is there in full and comes along with the encoders: its settings are not compared
        columns: Mapping[str, ColumnSpec] = known
    else:
        columns = _columns(config, source)
        if begun and declared is not None:
            _check_declared(config, source, declared, columns, known)
        if (settings := _attention(config, source)) is not None and settings.factored:
            at_most = not begun
            columns = known if begun else columns
    rows = sum(len(manifest.shard_range(shard)) for shard in missing)
    least = _columns(config, source, smallest=True) if at_most else columns
    packed = any(spec.compressor is not None for spec in columns.values())
    return SourcePlan(
        source=source,
        columns=columns,
        missing=missing,
        rows=rows,
        bytes=_bytes(manifest, missing, columns),
        least_bytes=int(_bytes(manifest, missing, least) * (_LEAST_RATIO if packed else 1)),
        at_most=at_most,
        declared=declared,
        drawn=declared.random_weights if declared is not None else _is_drawn(config, source),
    )


def _bytes(manifest: Manifest, missing: Sequence[int], columns: Mapping[str, ColumnSpec]) -> int:
    """Count what the missing shards of some columns take uncompressed, with checksums and indexes."""
    rows = sum(len(manifest.shard_range(shard)) for shard in missing)
    views = len(manifest.views)
    index = len(missing) * index_bytes(manifest.shard_rows, views)
    return sum(rows * views * (spec.row_bytes + CHECKSUM_BYTES) + index for spec in columns.values())


def _attention(config: PreprocessConfig, source: str) -> AttentionSettings | None:
    """Return how a source's attention is to be stored, or None if it is none."""
    encoder = model_of(source)
    return None if encoder == source else config.attention_settings(encoder)


def _columns(config: PreprocessConfig, source: str, *, smallest: bool = False) -> dict[str, ColumnSpec]:
    """Return the columns a source would have, from what is known of it without its weights.

    Of the components that the factors of attention may get the most, or the fewest.
    """
    if source == AUTOENCODER:
        from .encoders.vae import latent_shape

        channels, rows, columns = latent_shape(
            _vae(config), config.resolution, random_weights=config.random_weights
        )
        return {MOMENTS: ColumnSpec(shape=(2 * channels, rows, columns), dtype="float32")}
    teacher = config.teacher(model_of(source))
    rows, columns = teacher.grid(config.resolution)
    settings = _attention(config, source)
    if settings is None:
        return token_columns(
            source,
            tokens=rows * columns,
            width=teacher.width,
            dtype=config.feature_dtype,
            compressor=config.compress,
        )
    if settings.factored:
        heads = teacher.heads * len(settings.blocks)
        most = teacher.head_width
        if settings.bytes is not None:
            # as many whole components as hold the bytes asked for
            most = min(most, -(-settings.bytes // (heads * (2 * rows * columns + 4))))
        components = (0, 1) if smallest else (most, 0)
        layout = FactorLayout(
            tokens=rows * columns, components=((components,) * teacher.heads,) * len(settings.blocks)
        )
        return factored_columns(teacher.name, layout, settings.compressor)
    return attention_columns(
        teacher.name,
        blocks=len(settings.blocks),
        heads=teacher.heads,
        tokens=rows * columns,
        rank=teacher.head_width if settings.rank is None else settings.rank,
        dtype=settings.stored_dtype,
        compressor=settings.compressor,
    )


def _is_drawn(config: PreprocessConfig, source: str) -> bool:
    """Tell whether the weights would be drawn because that is asked for and none are at hand."""
    if source == AUTOENCODER:
        from .encoders.vae import is_drawn

        return is_drawn(_vae(config), random_weights=config.random_weights)
    encoder = model_of(source)
    return config.random_weights and encoder not in config.weights and encoder != DEMO_DATA


def _vae(config: PreprocessConfig) -> str:
    assert config.vae is not None, "the plan resolves the command"
    return config.vae


def _check_declared(
    config: PreprocessConfig,
    source: str,
    declared: Provenance,
    columns: Mapping[str, ColumnSpec],
    present: Mapping[str, ColumnSpec],
) -> None:
    """Refuse at once what `ensure_source` would refuse later, or never when no model needs loading."""
    asked: list[tuple[str, object, object]] = [
        ("--batch-size", declared.batch_size, config.batch_size),
        ("--compute-dtype", declared.compute_dtype, config.compute_dtype),
        ("--random-weights", declared.random_weights, _is_drawn(config, source)),
    ]
    settings = _attention(config, source)
    if settings is not None:
        blocks = [",".join(map(str, each)) for each in (declared.notes["blocks"], settings.blocks)]
        asked.append(("--attention", blocks[0], blocks[1]))
        asked.append(("attention stored", describe_attention(declared.notes, present), settings.describe()))
    elif source != AUTOENCODER:
        patch = column_name(source, "patch")
        asked.append(("--feature-dtype", present[patch].dtype, columns[patch].dtype))
    if source != AUTOENCODER:
        packed = [next(iter(specs.values())).compressor for specs in (present, columns)]
        asked.append(("--compress", packed[0], packed[1]))
    different = [f"{flag} {here}, not {wanted}" for flag, here, wanted in asked if here != wanted]
    if different:
        raise CacheError(
            f"cache {config.cache} has {source} made with {', '.join(different)}",
            "give the same flags, or write another cache with --cache",
        )
