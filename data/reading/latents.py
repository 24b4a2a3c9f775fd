"""From stored posterior moments to the latents a backbone trains on, and back.

The cache holds the autoencoder's posterior mean and standard deviation, unscaled; the draw and the scaling
are made at load, so that changing them needs no new cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import CacheError
from ..format.columns import AUTOENCODER

if TYPE_CHECKING:
    from torch import Tensor

    from ..format.manifest import Manifest


class LatentScale(NamedTuple):
    """The affine map between the autoencoder's latent and the one a backbone trains on.

    Attributes:
        scaling_factor: what the shifted latent is multiplied by; 0.18215 for Stable Diffusion.
        shift_factor: what is subtracted first; 0 for Stable Diffusion 1 and 2.
    """

    scaling_factor: float
    shift_factor: float = 0.0


def latent_scale(manifest: Manifest, *, where: str) -> LatentScale:
    """The map recorded with the cache's autoencoder.

    Args:
        manifest: the manifest.
        where: path of the cache, for the error.

    Raises:
        CacheError: the cache has no autoencoder, or its scaling factor was not recorded.
    """
    provenance = manifest.sources.get(AUTOENCODER)
    if provenance is None:
        raise CacheError(
            f"cache {where} has no {AUTOENCODER}", f"add it with `repa preprocess --cache {where}`"
        )
    notes = provenance.notes
    factor = notes.get("scaling_factor")
    if not isinstance(factor, (int, float)) or factor == 0:
        raise CacheError(
            f"the manifest of cache {where} gives {AUTOENCODER} the scaling factor {factor!r}, "
            "not a number other than 0",
            "write the cache again with `repa preprocess`",
        )
    return LatentScale(float(factor), float(notes.get("shift_factor") or 0.0))


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """A draw from the diagonal Gaussian posterior, ``mean + std·noise``.

    Source: Kingma & Welling, "Auto-Encoding Variational Bayes", section 2.4.

    Args:
        moments: ``[B, 2C, h, w]``, mean in the first C channels, standard deviation in the rest.
        noise: standard normal ``[B, C, h, w]``.

    Returns:
        The latent ``[B, C, h, w]``, unscaled.

    Raises:
        ValueError: the shapes do not fit.
    """
    channels = noise.shape[1]
    expected = (noise.shape[0], 2 * channels, *noise.shape[2:])
    if tuple(moments.shape) != expected:
        raise ValueError(f"moments {tuple(moments.shape)} do not fit the noise: want {expected}")
    return moments[:, :channels] + moments[:, channels:] * noise


def scale_latent(latent: Tensor, scaling_factor: float, shift: float = 0.0) -> Tensor:
    """``(latent − shift)·scaling_factor``: what a backbone trains on, of the latent's shape and dtype."""
    return (latent - shift) * scaling_factor


def unscale_latent(latent: Tensor, scaling_factor: float, shift: float = 0.0) -> Tensor:
    """``latent / scaling_factor + shift``: what the autoencoder decodes; the inverse of `scale_latent`."""
    return latent / scaling_factor + shift
