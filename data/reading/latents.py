"""From stored posterior moments to the latents a backbone trains on, and back.

The cache holds the autoencoder's posterior mean and standard deviation, unscaled; the draw and the scaling
are made at load, so that changing them needs no new cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ..edge import parse
from ..errors import CacheError, RepaError
from ..format.columns import AUTOENCODER, MOMENTS
from ..format.manifest import LATENTS_NOTE

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from ..format.manifest import Manifest


class LatentScale(NamedTuple):
    """The affine map between the autoencoder's latent and the one a backbone trains on, see `scale_latent`.

    Attributes:
        scaling_factor: what the shifted latent is multiplied by; 0.18215 for Stable Diffusion.
        shift_factor: what is subtracted first; 0 for Stable Diffusion 1 and 2.
        mean: what is subtracted from each of C channels instead; empty for most autoencoders.
        std: what each of C channels is divided by; empty where `mean` is.
    """

    scaling_factor: float
    shift_factor: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def replaced(self, factor: float | None, shift: float | None) -> LatentScale:
        """Return the map with another factor or shift where they are given.

        Raises:
            RepaError: a shift for an autoencoder that has a mean for each channel.
        """
        if shift is not None and self.mean:
            raise RepaError(
                f"latent_shift={shift:g}, and the autoencoder has a mean for each channel of its latents",
                "leave latent_shift out",
                field="latent_shift",
            )
        return self._replace(
            scaling_factor=self.scaling_factor if factor is None else factor,
            shift_factor=self.shift_factor if shift is None else shift,
        )

    def notes(self) -> dict[str, Any]:
        """Return what `scale_of` reads again.

        They are plain values, the statistics only where there are some.
        """
        values: dict[str, Any] = {"scaling_factor": self.scaling_factor, "shift_factor": self.shift_factor}
        if self.mean:
            values |= {"latents_mean": list(self.mean), "latents_std": list(self.std)}
        return values


AUTOENCODER_NORM, CHANNEL_NORM, STABLE_DIFFUSION_NORM = "autoencoder", "channel", "sd"
LATENT_NORMS = (AUTOENCODER_NORM, CHANNEL_NORM, STABLE_DIFFUSION_NORM)
"""What latents may be normalised by.

The autoencoder's own configuration, measured statistics of each channel, or Stable Diffusion's one factor."""

STABLE_DIFFUSION_SCALE = LatentScale(0.18215)


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What an autoencoder's configuration says of its latents, in diffusers' words."""

    scaling_factor: float
    shift_factor: float | None
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None


def scale_of(
    values: Mapping[str, Any],
    *,
    where: str,
    remedy: str,
    channels: int | None = None,
    error: type[RepaError] = CacheError,
) -> LatentScale:
    """Return the map that the configuration of an autoencoder describes, or what was recorded of it.

    Args:
        values: has ``scaling_factor``, and may have ``shift_factor``, ``latents_mean`` and ``latents_std``,
            as the configuration of diffusers' ``AutoencoderKL``.
        where: what they are of, for the error.
        remedy: what to do about them.
        channels: C, where it is known.
        error: class of what is raised.

    Raises:
        RepaError: a value that is none, or statistics that no formula gives a meaning.
    """
    keys = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    said = parse(_Said, {key: values.get(key) for key in keys}, where=where, remedy=remedy, error=error)
    shift, mean, std = said.shift_factor or 0.0, said.latents_mean or (), said.latents_std or ()
    if said.scaling_factor == 0:
        raise error(f"{where}: scaling_factor is 0", remedy, field="scaling_factor")
    if bool(mean) != bool(std):
        has, lacks = ("latents_mean", "latents_std") if mean else ("latents_std", "latents_mean")
        raise error(f"{where} has {has} and no {lacks}", remedy, field=lacks)
    if len(mean) != len(std) or (mean and channels is not None and len(mean) != channels):
        wanted = "" if channels is None else f", for {channels} channels"
        raise error(
            f"{where} has {len(mean)} values of latents_mean and {len(std)} of latents_std{wanted}",
            remedy,
            field="latents_mean",
        )
    if any(each <= 0 for each in std):
        raise error(f"{where} has a latents_std that is not above 0", remedy, field="latents_std")
    if mean and shift:
        raise error(
            f"{where} has both latents_mean and a shift_factor, and nothing says how they go together",
            remedy,
            field="shift_factor",
        )
    return LatentScale(said.scaling_factor, shift, mean, std)


def latent_scale(manifest: Manifest, *, where: str) -> LatentScale:
    """Return the map recorded with the cache's autoencoder.

    Args:
        manifest: the manifest.
        where: path of the cache, for the error.

    Raises:
        CacheError: the cache has no autoencoder, or its scaling factor was not recorded.
    """
    provenance = manifest.sources.get(AUTOENCODER)
    if provenance is None:
        raise CacheError(
            f"cache {where} has no {AUTOENCODER}",
            f"add it with `repa preprocess --cache {where}`",
            field=AUTOENCODER,
        )
    moments = manifest.columns.get(MOMENTS)
    return scale_of(
        provenance.notes,
        where=f"the {AUTOENCODER} of cache {where}",
        remedy="write the cache again with `repa preprocess`",
        channels=None if moments is None or not moments.shape else moments.shape[0] // 2,
    )


def chosen_scale(manifest: Manifest, norm: str, *, where: str) -> LatentScale:
    """Return the map of one of `LATENT_NORMS`.

    Args:
        manifest: of the cache.
        norm: its name.
        where: path of the cache, for the error.

    Raises:
        CacheError: the cache has no autoencoder, or does not say what is asked for.
    """
    recorded = latent_scale(manifest, where=where)
    if norm == AUTOENCODER_NORM:
        return recorded
    if norm == STABLE_DIFFUSION_NORM:
        return STABLE_DIFFUSION_SCALE
    found = manifest.sources[AUTOENCODER].notes.get(LATENTS_NOTE)
    if found is None:
        raise CacheError(
            f"cache {where} does not say mean and standard deviation of its latents",
            "measure them with `repa cache upgrade`",
            field="latent_norm",
        )
    return scale_of(
        {"scaling_factor": 1.0, "latents_mean": found["mean"], "latents_std": found["std"]},
        where=f"the statistics of the latents of cache {where}",
        remedy="write the cache again with `repa preprocess`",
        channels=manifest.columns[MOMENTS].shape[0] // 2 if MOMENTS in manifest.columns else None,
    )


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw from the diagonal Gaussian posterior, ``mean + std·noise``.

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


def scale_latent(
    latent: Tensor,
    scaling_factor: float,
    shift: float = 0.0,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Tensor:
    """Return what a backbone trains on, ``(latent − shift)·scaling_factor``, in the latent's dtype.

    With statistics of the channels it is ``(latent − mean)·scaling_factor / std``, as in diffusers' pipelines
    for an ``AutoencoderKL`` that has them.

    Args:
        latent: ``[B, C, h, w]``; of any shape without statistics.
        scaling_factor: see `LatentScale`.
        shift: see `LatentScale`.
        mean: C numbers, or none.
        std: C numbers, or none.
    """
    if mean:
        centred = latent - _of_channels(mean, latent.dtype, latent.device)
        return centred * scaling_factor / _of_channels(std, latent.dtype, latent.device)
    return (latent - shift) * scaling_factor


def unscale_latent(
    latent: Tensor,
    scaling_factor: float,
    shift: float = 0.0,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Tensor:
    """Return what the autoencoder decodes, the inverse of `scale_latent`."""
    if mean:
        spread = latent * _of_channels(std, latent.dtype, latent.device) / scaling_factor
        return spread + _of_channels(mean, latent.dtype, latent.device)
    return latent / scaling_factor + shift


@lru_cache(maxsize=16)
def _of_channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the numbers as ``[1, C, 1, 1]``.

    They are kept, as a copy to the device in every step would wait for it.
    """
    import torch

    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)
