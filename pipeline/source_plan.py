"""What is left to do of one source, its columns and bytes, before its model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.errors import CacheError
from ..data.format.columns import AUTOENCODER, MOMENTS, ColumnSpec, column_name, model_of
from ..data.format.commits import is_committed
from ..data.format.factor_layout import FactorLayout
from ..data.format.shard_index import index_bytes
from ..data.storage.bucket import look_again, map_files
from ..data.storage.local import CHECKSUM_BYTES
from .columns.specs import attention_columns, describe_attention, factored_columns, token_columns
from .images.names import DEMO_DATA

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..data.format.manifest import Manifest, Provenance
    from ..data.storage.bucket import CachePath
    from .columns.specs import AttentionSettings
    from .config import PreprocessConfig

LEAST_RATIO = 0.5  # no lossless compressor halves features


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """What is left to do of one source.

    Attributes:
        source: its name.
        columns: its columns, name → spec.
        missing: shards of the job that are not committed.
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


def missing_shards(
    cache: CachePath, present: Manifest | None, source: str, shards: Iterable[int]
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
    look_again(cache)
    committed = map_files(lambda shard: is_committed(cache, present, source, shard), shards, cache)
    return tuple(shard for shard, found in zip(shards, committed, strict=True) if not found)


def plan_source(
    config: PreprocessConfig, manifest: Manifest, present: Manifest | None, source: str, share: range
) -> SourcePlan:
    """Look at what a source of the cache has and lacks.

    Args:
        config: the command, nothing left open.
        manifest: what the cache is to be.
        present: the cache's manifest, None when nothing is there yet.
        source: name of the source.
        share: shards of the job.

    Raises:
        RepaError: there is no such teacher, or it gives no grid at the resolution.
        CacheError: it was begun in another way.
    """
    declared = present.sources.get(source) if present is not None else None
    known = present.source_columns(source) if present is not None else {}
    absent = missing_shards(config.cache, present, source, range(manifest.num_shards))
    missing = tuple(shard for shard in absent if shard in share)
    begun = declared is not None and len(absent) < manifest.num_shards
    at_most = False
    if source == AUTOENCODER and begun and not absent:
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
        bytes=uncompressed_bytes(manifest, missing, columns),
        least_bytes=int(uncompressed_bytes(manifest, missing, least) * (LEAST_RATIO if packed else 1)),
        at_most=at_most,
        declared=declared,
        drawn=declared.random_weights if declared is not None else _is_drawn(config, source),
    )


def uncompressed_bytes(manifest: Manifest, missing: Sequence[int], columns: Mapping[str, ColumnSpec]) -> int:
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
