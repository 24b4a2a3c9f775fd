"""What is left to do of the captions of a cache, in shards and bytes, before a text encoder is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...data.errors import CacheError
from ...data.format.captions import captions_manifest, captions_path, number_captions
from ...data.format.columns import AUTOENCODER, TEXT_STATES, column_name, model_of
from ..plan import present_manifest
from ..shares import AUTO_SHARDS, job_shards
from ..source_plan import LEAST_RATIO, SourcePlan, missing_shards, uncompressed_bytes
from ..text.encoder import text_sizes
from ..text.registry import find_text_encoder
from .open import open_captions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.format.columns import ColumnSpec
    from ...data.format.manifest import Manifest
    from ...data.storage.bucket import CachePath
    from ..config import PreprocessConfig
    from ..plan import Plan
    from .base import ImageCaptions

DEFAULT_BATCH_SIZE = 32
"""Captions of a forward pass, all of one length."""


@dataclass(frozen=True, kw_only=True)
class CaptionPlan:
    """All that is left to do of the captions.

    Attributes:
        config: the command as asked for.
        images: manifest that the cache of the images is to have.
        captions: of the images.
        texts: the distinct captions, by row.
        manifest: what the cache of the captions is to be, sources left out.
        share: shards of this job.
        sources: what is left of each text encoder, of those shards.
        batch_sizes: source → captions of a forward pass.
    """

    config: PreprocessConfig
    images: Manifest
    captions: ImageCaptions
    texts: tuple[str, ...]
    manifest: Manifest
    share: range
    sources: tuple[SourcePlan, ...]
    batch_sizes: Mapping[str, int]

    @property
    def path(self) -> CachePath:
        """Where the captions lie."""
        return captions_path(self.config.cache)

    @property
    def bytes(self) -> int:
        """What is to be written, at most."""
        return sum(source.bytes for source in self.sources)

    @property
    def least_bytes(self) -> int:
        """What is to be written, at least."""
        return sum(source.least_bytes for source in self.sources)

    @property
    def rows(self) -> int:
        """Captions to encode, each once for each text encoder."""
        return sum(source.rows for source in self.sources)


def make_caption_plan(plan: Plan, config: PreprocessConfig) -> CaptionPlan | None:
    """Look at the captions of a cache and at what its text encoders have written.

    Args:
        plan: of the images.
        config: the command as asked for.

    Returns:
        What is left to do; None if the command names no text encoder.

    Raises:
        RepaError: captions that cannot be read or matched, an unknown text encoder, files that are not its.
        CacheError: the cache has other captions, or a source of theirs was begun in another way.
    """
    if not config.text_encoders:
        return None
    for name in config.text_encoders:
        find_text_encoder(name)
    captions = open_captions(config, plan.images)
    texts, table = number_captions(captions.of_images)
    manifest = captions_manifest(plan.manifest, texts, table)
    path = captions_path(config.cache)
    present = present_manifest(path)
    if present is not None and present.identity != manifest.identity:
        raise CacheError(
            f"the images of {config.cache} have other captions than {captions.name}",
            f"give the same --captions and --captions-per-image as before, or none, or delete {path}",
            field="--captions",
        )
    share = _share(config, plan, manifest)
    batch_sizes = {name: _batch_size(config, present, name) for name in config.text_encoders}
    return CaptionPlan(
        config=config,
        images=plan.manifest,
        captions=captions,
        texts=tuple(texts),
        manifest=manifest,
        share=share,
        sources=tuple(
            _plan_source(replace(config, batch_size=batch_sizes[name]), path, manifest, present, name, share)
            for name in config.text_encoders
        ),
        batch_sizes=batch_sizes,
    )


def _share(config: PreprocessConfig, plan: Plan, captions: Manifest) -> range:
    """Return the shards of captions that are this job's.

    A range of ``--shards`` is of the images' shards, and takes its part of the captions': jobs that have all
    shards of the images between them have all of the captions.
    """
    if config.shards is None or config.shards == AUTO_SHARDS:
        return job_shards(config.shards, captions.num_shards)
    ends = plan.share.start, plan.share.stop
    first, end = (each * captions.num_shards // plan.manifest.num_shards for each in ends)
    return range(first, end)


def caption_columns(config: PreprocessConfig, name: str) -> dict[str, ColumnSpec]:
    """Return the columns that a text encoder would have, without its weights.

    Raises:
        RepaError: its folder is not its own.
    """
    sizes = text_sizes(find_text_encoder(name), config.weights.get(name))
    return sizes.columns(name, config.feature_dtype, config.compress)


def _batch_size(config: PreprocessConfig, present: Manifest | None, name: str) -> int:
    if config.batch_size is not None:
        return config.batch_size
    known = None if present is None else present.sources.get(name)
    return DEFAULT_BATCH_SIZE if known is None else known.batch_size


def _plan_source(
    config: PreprocessConfig,
    path: CachePath,
    manifest: Manifest,
    present: Manifest | None,
    name: str,
    share: range,
) -> SourcePlan:
    declared = None if present is None else present.sources.get(name)
    absent = missing_shards(path, present, name, range(manifest.num_shards))
    missing = tuple(shard for shard in absent if shard in share)
    columns = caption_columns(config, name)
    drawn = config.random_weights and name not in config.weights
    if declared is not None and present is not None and len(absent) < manifest.num_shards:
        known = present.source_columns(name)
        _check_declared(config, present, name, drawn)
        # a folder's sizes are known only where it is named again
        columns = known
    least = LEAST_RATIO if any(spec.compressor is not None for spec in columns.values()) else 1
    size = uncompressed_bytes(manifest, missing, columns)
    return SourcePlan(
        source=name,
        columns=columns,
        missing=missing,
        rows=sum(len(manifest.shard_range(shard)) for shard in missing),
        bytes=size,
        least_bytes=int(size * least),
        at_most=False,
        declared=declared,
        drawn=drawn if declared is None else declared.random_weights,
    )


def _check_declared(config: PreprocessConfig, present: Manifest, name: str, drawn: bool) -> None:
    """Refuse at once what `ensure_source` would refuse later, or never when nothing is left to do."""
    declared = present.sources[name]
    states = present.columns[column_name(name, TEXT_STATES)]
    asked = [
        ("--batch-size", declared.batch_size, config.batch_size),
        ("--compute-dtype", declared.compute_dtype, config.compute_dtype),
        ("--random-weights", declared.random_weights, drawn),
        ("--feature-dtype", states.dtype, config.feature_dtype),
        ("--compress", states.compressor, config.compress),
    ]
    different = [f"{flag} {here}, not {wanted}" for flag, here, wanted in asked if here != wanted]
    if different:
        raise CacheError(
            f"cache {config.cache} has {name} made with {', '.join(different)}",
            "give the same flags, or write another cache with --cache",
        )


def unfinished_encoders(cache: CachePath) -> tuple[str, ...] | None:
    """Return the teachers of a cache that are not wholly written.

    Args:
        cache: its folder.

    Returns:
        Their names; None where there is no cache with all of its latents yet.

    Raises:
        CacheError: a file stands there, or a cache that cannot be read.
    """
    present = present_manifest(cache)
    if present is None or AUTOENCODER not in present.sources:
        return None
    shards = range(present.num_shards)
    if missing_shards(cache, present, AUTOENCODER, shards):
        return None
    names = [source for source in present.sources if missing_shards(cache, present, source, shards)]
    return tuple(dict.fromkeys(map(model_of, names)))
