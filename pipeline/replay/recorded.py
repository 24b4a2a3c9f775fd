"""The command that wrote a source, read from its manifest, to encode the source once more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path  # noqa: TC003 — dataclasses read it
from typing import TYPE_CHECKING

from ...data.errors import CacheError
from ...data.format.columns import AUTOENCODER, PACKED, SCALE_SUFFIX, model_of
from ...data.format.foreign import autoencoder_of
from ...data.format.layout import calibration_file
from ...data.format.opening import declaration, differences
from ...data.upkeep.repair import withdraw_calibration
from ...data.writing.calibrations import check_calibration, read_calibration, recorded_sha256
from ..columns.specs import recorded_rank
from ..config import PreprocessConfig
from ..images.names import DEFAULT_DATA, DEMO_DATA
from ..images.views import check_views
from ..plan import Plan
from ..run import share_out
from ..shard_loop.ranks import Rank
from ..shard_loop.worker import calibrator
from .images import images_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.format.manifest import Manifest
    from ...data.storage.bucket import CachePath
    from ..columns.models import SourceModel
    from ..images.base import ImageSource
    from ..shard_loop.worker import Job


@dataclass(frozen=True, kw_only=True)
class Given:
    """Where images and weights lie, which a manifest does not say.

    Attributes:
        data: the images, see `open_source`; None: ``images``, of a cache of the demo ``demo``.
        vae: hub name or folder of the autoencoder; None: where it lay when the cache was made.
        weights: encoder → file of its weights; others come from the hub or its local copy.
    """

    data: str | None
    vae: str | None
    weights: Mapping[str, Path]


def recorded_images(cache: CachePath, manifest: Manifest, given: Given) -> ImageSource:
    """Open the images of a cache.

    Raises:
        RepaError: they cannot be listed.
        CacheError: these are other images, or the cache has views that cannot be encoded here.
    """
    check_views(manifest.views, cache)
    demo = manifest.source_kind == DEMO_DATA
    return images_of(manifest, given.data or (DEMO_DATA if demo else DEFAULT_DATA), cache, may_import=True)


def recorded_config(cache: CachePath, manifest: Manifest, source: str, given: Given) -> PreprocessConfig:
    """Return the configuration that would write a source as it was written.

    Args:
        cache: folder of the cache.
        manifest: its manifest.
        source: the source; the command writes others too, which must not be asked of it.
        given: see `Given`.
    """
    provenance = manifest.sources[source]
    columns = manifest.source_columns(source)
    config = PreprocessConfig(
        data=given.data or "",
        cache=cache,
        encoders=(),
        vae=given.vae or _location(manifest),
        resolution=manifest.resolution,
        views=manifest.views,
        batch_size=provenance.batch_size,
        compute_dtype=provenance.compute_dtype,
        random_weights=provenance.random_weights,
        apply_exif=manifest.exif_orientation == "applied",
        shard_rows=manifest.shard_rows,
    )
    if source == AUTOENCODER:
        return config
    model = model_of(source)
    spec = next(spec for name, spec in columns.items() if not name.endswith((SCALE_SUFFIX, "/cls")))
    own = {model: given.weights[model]} if model in given.weights else {}
    config = replace(config, encoders=(model,), weights=own, compress=spec.compressor)
    if spec.dtype != PACKED:
        config = replace(config, feature_dtype=spec.dtype)
    if source == model:
        return config
    notes = provenance.notes
    return replace(
        config,
        attention={model: tuple(notes["blocks"])},
        attention_rank=recorded_rank(notes),
        attention_kl=notes.get("tolerance"),
        attention_bytes=notes.get("bytes"),
    )


def _location(manifest: Manifest) -> str:
    """Return where the autoencoder lay. Any name will do where nothing is encoded by it."""
    known = manifest.sources.get(AUTOENCODER)
    return (None if known is None else autoencoder_of(known)) or DEMO_DATA


def recorded_job(config: PreprocessConfig, manifest: Manifest, images: ImageSource) -> Job:
    """Make the job of the one process that encodes, on the first GPU or with all cores."""
    bare = replace(manifest, columns={}, sources={})
    every = range(manifest.num_shards)
    plan = Plan(config=config, images=images, manifest=bare, share=every, sources=(), free_bytes=0)
    return share_out(plan, Rank())[0]


def recorded_model(job: Job, manifest: Manifest, source: str, images: ImageSource) -> SourceModel:
    """Load the model of a source and settle its storage form, and hold both against what is recorded.

    A calibration that is damaged is fitted again.

    Args:
        job: see `recorded_job`.
        manifest: of the cache.
        source: the source.
        images: of the cache.

    Raises:
        RepaError: weights that are not there.
        CacheError: weights, or a form, other than the recorded ones: nothing has been changed.
    """
    from ..loading import load_models

    cache, declared = job.config.cache, manifest.sources[source]
    [model] = load_models(job.config, [source], job.device)
    found = model.provenance.weights_sha256
    if found != declared.weights_sha256:
        name = model_of(source)
        flag = "--vae FOLDER" if source == AUTOENCODER else f"--weights {name}=FILE"
        raise CacheError(
            f"the {name} at hand is not the one that wrote {source} of cache {cache}: its weights have "
            f"sha256 {found[:12]}…, the cache's {declared.weights_sha256[:12]}…",
            f"give the cache's with {flag}",
        )
    _drop_damaged_calibration(cache, manifest, source)
    model.prepare(calibrator(job, images))
    now = model.declarations[source]
    different = differences(
        declaration(declared, manifest.source_columns(source)), declaration(now.provenance, now.columns)
    )
    if different:
        raise CacheError(
            f"cache {cache} has {source} in a form that cannot be had again here: {different}",
            "encode on a device and with libraries as recorded, or write another cache with --cache",
        )
    return model


def _drop_damaged_calibration(cache: CachePath, manifest: Manifest, source: str) -> None:
    recorded, stored = recorded_sha256(manifest.sources[source]), read_calibration(cache, source)
    if recorded is None or stored is None:
        return
    try:
        check_calibration(calibration_file(cache, source), stored, recorded)
    except CacheError:
        withdraw_calibration(cache, source)
