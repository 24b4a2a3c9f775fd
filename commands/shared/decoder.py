"""The decoder that the trainer asks of stage 1, which is loaded when first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ...data.errors import RepaError
from ...data.reading.latents import LatentScale

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from ...pipeline.encoders.rae import TokenDecoder
    from ...pipeline.encoders.vae import Autoencoder
    from ...trainer.sampling.generate import TrainedModel
    from ...trainer.step.latents import TokenSource


class AnyDecoder(Protocol):
    """What makes images of what a model makes.

    Attributes:
        name: hub name or folder.
        weights_sha256: hash of its weights.
        scale: the map from what it decodes to a backbone's latents, as its configuration says it.
        stride: pixels per position of a latent, along a side.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def weights_sha256(self) -> str: ...  # noqa: D102
    @property
    def scale(self) -> LatentScale: ...  # noqa: D102
    @property
    def stride(self) -> int: ...  # noqa: D102

    def decode(self, latent: Tensor) -> Tensor:
        """Decode unscaled latents ``[B, C, h, w]`` to images uint8 ``[B, 3, R, R]``."""
        ...


def decoder_for(
    model: TrainedModel, name: str, device: str, *, random_weights: bool, teacher_weights: Path | None
) -> AnyDecoder:
    """Return what makes images of a model's samples, its weights not read yet.

    Args:
        model: whose samples.
        name: hub name or folder.
        device: where to compute.
        random_weights: draw the weights of an autoencoder, as the cache's were.
        teacher_weights: file of the teacher of a model of tokens.
    """
    if model.tokens is None:
        return Decoder(name, device, random_weights=random_weights)
    return DecoderOfTokens(name, model.tokens, device, weights=teacher_weights)


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
    def stride(self) -> int:
        """Pixels per position of a latent, along a side."""
        stride: int = self.load().stride
        return stride

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


class DecoderOfTokens:
    """Decodes the tokens of a teacher. Weights are read from disk or hub at the first call, or at `load`.

    Args:
        name: hub name or folder of an ``AutoencoderRAE``.
        tokens: whose they are.
        device: where to compute.
        weights: file of the teacher, whose final norm is undone; None takes the hub's or its local copy.
    """

    scale = LatentScale(1.0)

    def __init__(
        self, name: str, tokens: TokenSource, device: str | torch.device, *, weights: Path | None = None
    ) -> None:
        self.name = name
        self._tokens = tokens
        self._device = device
        self._weights = weights
        self._decoder: TokenDecoder | None = None

    def load(self) -> TokenDecoder:
        """Load decoder and final norm.

        Raises:
            RepaError: the files of either are neither here nor reachable, the decoder is of another teacher
                or grid, or the teacher's weights are not those that the cache was written with.
        """
        if self._decoder is None:
            from ...pipeline.encoders.rae import FLAG, TEACHER_FLAG, TokenDecoder, final_norm

            tokens = self._tokens
            norm = final_norm(
                tokens.teacher,
                resolution=tokens.resolution,
                weights=self._weights,
                random_weights=tokens.random_weights,
            )
            if norm.weights_sha256 != tokens.weights_sha256:
                raise RepaError(
                    f"the weights of {tokens.teacher} are not those that made the tokens of the cache",
                    f"give {TEACHER_FLAG} the file that the cache was written with",
                    field=TEACHER_FLAG,
                )
            decoder = TokenDecoder.load(self.name, norm, self._device)
            if (decoder.side, decoder.side) != tokens.grid:
                raise RepaError(
                    f"{self.name} decodes {decoder.side}×{decoder.side} tokens, and the model makes "
                    f"{tokens.grid[0]}×{tokens.grid[1]}",
                    f"give {FLAG} one for images of {tokens.resolution} pixels",
                    field=FLAG,
                )
            self._decoder = decoder
        return self._decoder

    @property
    def weights_sha256(self) -> str:
        """The hash of the decoder's weights."""
        return self.load().weights_sha256

    @property
    def stride(self) -> int:
        """Pixels per token, along a side."""
        return self.load().stride

    def decode(self, latent: Tensor) -> Tensor:
        """Decode tokens ``[B, D, h, w]`` to images uint8 ``[B, 3, R, R]``, one by one for memory.

        Raises:
            RepaError: see `load`.
        """
        import torch

        decoder = self.load()
        return torch.cat([decoder.decode(latent[i : i + 1]) for i in range(len(latent))])
