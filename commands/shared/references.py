"""What ``--reference`` names, and the networks that an evaluation loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.format.opening import open_manifest
from ...data.storage.bucket import cache_path, is_remote
from ...data.tars.names import names_tars
from ...pipeline.encoders import find_teacher
from ...pipeline.encoders.clip_similarity import NAME as CLIP
from ...pipeline.encoders.inception import NAME as INCEPTION
from ...pipeline.images.open import open_source
from ...trainer.evaluation.references import (
    FLAG,
    Reference,
    is_cache,
    reference_of_cache,
    reference_of_file,
)
from ...trainer.evaluation.results import ReferenceSaid
from .encoders import parse_weights
from .features import NetworkSpec, SourceImages

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ...trainer.evaluation.measuring import Asked


def open_reference(given: str, resolution: int | None) -> Reference:
    """Open what samples are compared with.

    Args:
        given: an .npz file, a cache or its address in a bucket, or a folder of images.
        resolution: side of the samples in pixels; None takes a cache's own, and caches alone.

    Raises:
        RepaError: it is none of these, or of images of another size.
        CacheError: the cache is damaged.
    """
    if names_tars(given):
        raise RepaError(
            f"{given} are tars, whose rows cannot be read in full beforehand",
            "make a cache of them with `repa cache import`",
            field=FLAG,
        )
    path = Path(given)
    if is_remote(given) or is_cache(path) or resolution is None:
        reference = reference_of_cache(cache_path(given))
    elif path.is_dir():
        return _folder(given, resolution)
    elif path.exists():
        reference = reference_of_file(path)
    else:
        raise RepaError(
            f"{given} does not exist", "give an .npz file, a cache or a folder of images", field=FLAG
        )
    if resolution is not None and reference.resolution not in (None, resolution):
        raise RepaError(
            f"the samples have {resolution}×{resolution} pixels, and the images of {given} "
            f"{reference.resolution}×{reference.resolution}",
            "compare with a reference of the same size",
            field=FLAG,
        )
    return reference


def _folder(given: str, resolution: int) -> Reference:
    source = open_source(given, labels="none")
    sha256 = source.fingerprint.partition(":")[2] or source.fingerprint
    images = SourceImages(data=given, resolution=resolution, count=len(source.keys), sha256=sha256)
    return Reference(
        said=ReferenceSaid(name=given, sha256=sha256, kind="folder"), resolution=resolution, images=images
    )


def network_specs(
    asked: Iterable[Asked],
    reference: Reference,
    resolution: int,
    inception: Path | None,
    encoder_weights: Sequence[str],
    clip: str | None = None,
) -> dict[str, NetworkSpec]:
    """Say which networks an evaluation needs, by name.

    Args:
        asked: the metrics.
        reference: what samples are compared with; an encoder of a cache is loaded as the cache recorded it.
        resolution: side of the samples in pixels.
        inception: file of Inception's weights.
        encoder_weights: texts ``NAME=FILE``.
        clip: folder of CLIP, or its name on the hub.

    Raises:
        RepaError: an unknown encoder, or weights that nothing is asked of.
    """
    files = parse_weights(encoder_weights, flag="--encoder-weights")
    names = dict.fromkeys(each.network for each in asked)
    needless = [name for name in files if name not in names]
    if needless:
        raise RepaError(f"no metric is of {needless[0]}", "leave its weights out", field="--encoder-weights")
    if inception is not None and INCEPTION not in names:
        raise RepaError("no metric is of Inception", "leave --inception out", field="--inception")
    if clip is not None and CLIP not in names:
        raise RepaError("no metric is of CLIP", "leave --clip out", field="--clip")
    recorded = {} if reference.cache is None else open_manifest(reference.cache).sources
    given: dict[str, Path | str | None] = {INCEPTION: inception, CLIP: clip}
    specs = {}
    for name in names:
        if name not in given:
            find_teacher(name, may_import=True)
        specs[name] = NetworkSpec(
            name=name,
            weights=given[name] if name in given else files.get(name),
            resolution=resolution,
            recorded=recorded.get(name) if name in reference.encoders else None,
        )
    return specs
