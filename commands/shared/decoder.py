"""The decoder that the trainer asks of stage 1, an autoencoder that is loaded when first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...data.reading.latents import LatentScale
    from ...pipeline.encoders.vae import Autoencoder


class Decoder:
    """Decodes latents. Weights are read from disk or hub at the first call, or at `load`.

    Args:
        name: hub name or folder of an ``AutoencoderKL``, or ``demo``.
        device: where to compute.
        random_weights: draw the weights, as the cache's were.
    """

    def __init__(self, name: str, device: str | torch.device, *, random_weights: bool = False) -> None:
        self.name = name
        self._device = device
        self._random_weights = random_weights
        self._autoencoder: Autoencoder | None = None

    def load(self) -> Autoencoder:
        """Load the autoencoder.

        Raises:
            RepaError: its files are neither here nor reachable.
        """
        if self._autoencoder is None:
            from ...pipeline.encoders.vae import Autoencoder

            self._autoencoder = Autoencoder.load(
                self.name, device=self._device, random_weights=self._random_weights
            )
        return self._autoencoder

    @property
    def weights_sha256(self) -> str:
        """The hash of its weights."""
        return self.load().weights_sha256

    @property
    def scale(self) -> LatentScale:
        """The map from its latents to a backbone's, as its configuration says it."""
        return self.load().scale

    def decode(self, latent: Tensor) -> Tensor:
        """Decode unscaled latents ``[B, C, h, w]`` to images uint8 ``[B, 3, R, R]``, one by one for memory.

        Raises:
            RepaError: its files are neither here nor reachable.
        """
        import torch

        autoencoder = self.load()
        return torch.cat([autoencoder.decode(latent[i : i + 1]) for i in range(len(latent))])
