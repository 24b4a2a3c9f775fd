"""How far outputs computed in TF32, bfloat16 or float16 lie from those of float32.

Measured on some images before the first shard, by the same network on the same device, both in batches of the
size that the cache is written with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import RepaError
from ...data.format.columns import AUTOENCODER, attention_source
from ...data.format.manifest import DEVIATION_NOTE
from .fitting import rounded
from .measures import TokenErrors, attention_divergence

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.format.manifest import Provenance
    from ..encoders.base import Encoder
    from ..encoders.vae import Autoencoder
    from .fitting import Passes, Pixels

DEVIATION_IMAGES = 32

EXACT_DTYPE = "float32"


def deviation_notes(
    wanted: Mapping[str, Provenance],
    recorded: Mapping[str, Provenance],
    measure: Callable[[Sequence[str]], Mapping[str, Mapping[str, Any]]],
) -> dict[str, Mapping[str, Any]]:
    """Return what the manifest notes of the sources of a model that is not computed in float32.

    What a source was declared with stays: it is measured once, and neither again by a run that resumes nor
    later for a source that was begun without.

    Args:
        wanted: source → provenance that it is to be declared with.
        recorded: the same of sources that the cache knows.
        measure: sources → source → note.
    """
    lower = {name: each for name, each in wanted.items() if each.compute_dtype != EXACT_DTYPE}
    kept = {
        name: recorded[name] for name in lower if name in recorded and _alike(recorded[name], lower[name])
    }
    missing = [name for name in lower if name not in kept]
    found: Mapping[str, Mapping[str, Any]] = measure(missing) if missing else {}
    notes = {name: each.notes[DEVIATION_NOTE] for name, each in kept.items() if DEVIATION_NOTE in each.notes}
    return {**notes, **found}


def _alike(one: Provenance, other: Provenance) -> bool:
    """Tell whether passes of both give the same numbers, however they are stored."""
    first, second = (
        (each.weights_sha256, each.compute_dtype, each.input_size, each.batch_size) for each in (one, other)
    )
    return first == second


def latent_deviation(autoencoder: Autoencoder, pixels: Pixels, passes: Passes) -> dict[str, dict[str, Any]]:
    """Measure how far posterior means lie from those of float32.

    Args:
        autoencoder: computing in another dtype.
        pixels: the images.
        passes: how they are run.

    Returns:
        Of the source: images, and ``relative_rms`` and ``relative_max``, the root mean square and the largest
        of the differences, both relative to the root mean square of the means in float32.

    Raises:
        RepaError: a mean is not finite.
    """
    exact, channels = autoencoder.in_float32(), autoencoder.latent_channels

    def measure(images: Tensor) -> dict[str, Tensor]:
        means = [each.encode_moments(images)[:, :channels].double() for each in (exact, autoencoder)]
        truth, off = means[0].flatten(1), (means[1] - means[0]).flatten(1)
        return {
            "truth": truth.square().mean(1, keepdim=True),
            "off": off.square().mean(1, keepdim=True),
            "largest": off.abs().amax(1, keepdim=True),
        }

    found = _concatenated(passes, pixels, measure)
    _check_finite(found, AUTOENCODER, autoencoder.compute_dtype)
    # of means that are all zero the differences themselves
    scale = np.sqrt(found["truth"].mean()) or 1.0
    note = {
        "images": len(pixels),
        "relative_rms": rounded(np.sqrt(found["off"].mean()) / scale),
        "relative_max": rounded(found["largest"].max() / scale),
    }
    return {AUTOENCODER: note}


def teacher_deviation(
    encoder: Encoder, sources: Collection[str], blocks: tuple[int, ...], pixels: Pixels, passes: Passes
) -> dict[str, dict[str, Any]]:
    """Measure how far a teacher's tokens and attention lie from those of float32.

    Args:
        encoder: computing in another dtype.
        sources: its tokens, its attention, or both.
        blocks: whose attention, counted from 1, ascending.
        pixels: the images.
        passes: how they are run.

    Returns:
        Of its tokens: images, ``cosine_error_mean`` and ``_max`` (1 − cosine of a token with that of
        float32). Of its attention: images, and the divergence KL(float32 ‖ computed) in nats per query,
        ``kl_mean`` over all and ``kl_worst_head``, the largest mean of a block and head.

    Raises:
        RepaError: a feature is not finite.
    """
    exact, attention = encoder.in_float32(), attention_source(encoder.name)
    errors = TokenErrors(encoder.grid[0] * encoder.grid[1], encoder.width)
    own = blocks if attention in sources else ()

    def measure(images: Tensor) -> dict[str, Tensor]:
        truth, found = exact.encode(images, own), encoder.encode(images, own)
        values = {}
        if encoder.name in sources:
            values["tokens"], _ = errors(truth["patch"], found["patch"])
        if own:
            pairs = [(each["q"], each["k"]) for each in (truth, found)]
            values["attention"] = attention_divergence(pairs[0], pairs[1], encoder.logit_scale)
        return values

    found = _concatenated(passes, pixels, measure)
    notes: dict[str, dict[str, Any]] = {}
    if "tokens" in found:
        _check_finite({"": found["tokens"]}, encoder.name, _dtype_of(encoder))
        notes[encoder.name] = {
            "images": len(pixels),
            "cosine_error_mean": rounded(found["tokens"].mean()),
            "cosine_error_max": rounded(found["tokens"].max()),
        }
    if "attention" in found:
        _check_finite({"": found["attention"]}, attention, _dtype_of(encoder))
        heads = found["attention"].mean(axis=(0, 3))
        notes[attention] = {
            "images": len(pixels),
            "kl_mean": rounded(heads.mean()),
            "kl_worst_head": rounded(heads.max()),
        }
    return notes


def _dtype_of(encoder: Encoder) -> str:
    return encoder.provenance(1).compute_dtype


def _concatenated(
    passes: Passes, pixels: Pixels, measure: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, NDArray[np.float64]]:
    batches = list(passes.over(pixels, measure))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _check_finite(values: Mapping[str, NDArray[np.float64]], source: str, compute_dtype: str) -> None:
    if not all(np.isfinite(each).all() for each in values.values()):
        raise RepaError(
            f"{source} is not finite where it is computed in {compute_dtype}",
            "try --compute-dtype float32, and check the weights",
            field="--compute-dtype",
        )
