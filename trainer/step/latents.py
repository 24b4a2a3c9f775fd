"""What a backbone learns to make, from the columns of a batch to x0, and from a sample to what is decoded.

Most runs take draws from the autoencoder's posterior. A run may also take the patch tokens of a teacher, as
representation autoencoders do (Zheng et al., arXiv 2510.11690).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from ...data.format.columns import MOMENTS, source_of
from ...data.format.int8 import dequantise
from ...data.reading.latents import LatentScale, sample_posterior, scale_latent, unscale_latent
from ..input.statistics import on_grid

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKENS = "tokens"
"""What a checkpoint says a `TokenSource` under."""
NAME = "latents"
"""Name of the module in a checkpoint's state dict."""


class Latents(Protocol):
    """What a backbone learns to make.

    Attributes:
        columns: what must be read of the cache.
        drawn: whether each latent is a draw, which takes noise of its shape.
    """

    @property
    def columns(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def drawn(self) -> bool: ...  # noqa: D102

    def x0(self, columns: Mapping[str, Tensor], posterior: Tensor | None) -> Tensor:
        """Return latents as a backbone takes them, float32 ``[B, C, h, w]``, where the columns lie.

        Args:
            columns: name → values as stored, at least those of `columns`.
            posterior: standard normal ``[B, C, h, w]``, for what is drawn.
        """
        ...

    def shape(self, columns: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
        """Return the shape ``(B, C, h, w)`` of the latents of columns."""
        ...

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return what a decoder takes of samples ``[B, C, h, w]``, where they lie."""
        ...


@dataclass(frozen=True)
class MomentLatents:
    """Draws from the posterior of the cache's autoencoder, scaled.

    Attributes:
        scale: from the autoencoder's latent to the backbone's.
    """

    scale: LatentScale
    columns: tuple[str, ...] = (MOMENTS,)
    drawn: bool = True

    def x0(self, columns: Mapping[str, Tensor], posterior: Tensor | None) -> Tensor:
        """Return scaled draws, see `Latents.x0`.

        Raises:
            ValueError: there is no noise to draw with.
        """
        if posterior is None:
            raise ValueError("a posterior is drawn from with noise")
        return scale_latent(sample_posterior(columns[MOMENTS].float(), posterior), *self.scale)

    def shape(self, columns: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
        """Return half the moments' shape."""
        count, channels, rows, width = columns[MOMENTS].shape
        return count, channels // 2, rows, width

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return what the autoencoder decodes."""
        return unscale_latent(latents, *self.scale)


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """Whose tokens a backbone learns to make, as checkpoints say it.

    Attributes:
        columns: the column ``[T, D]``, and that of its scales if it is int8.
        grid: rows and columns of the tokens, h·w = T.
        width: D.
        weights_sha256: hash of the teacher's weights, as the cache recorded it.
        random_weights: whether these were drawn.
        resolution: side in pixels of the images that the tokens are of.
    """

    columns: tuple[str, ...]
    grid: tuple[int, int]
    width: int
    weights_sha256: str
    random_weights: bool
    resolution: int

    @property
    def teacher(self) -> str:
        """Name of the teacher, that of its source in a cache."""
        return source_of(self.columns[0])


class TokenLatents(nn.Module):
    """Patch tokens of a teacher, standardised at each position and channel.

    That takes out every affine map of the channels, as the gain and bias of the teacher's final norm. Of
    a·n + b mean and deviation are a·mean(n) + b and |a|·deviation(n), so what is left is the same, mirrored
    where a < 0. The statistics are buffers, so that checkpoints have them.

    Args:
        columns: the column ``[T, D]``, and that of its scales if it is int8.
        mean: of each position and channel, float32 ``[D, h, w]`` with h·w = T.
        std: deviation, of the same shape, above 0.
    """

    drawn = False
    mean: Tensor
    std: Tensor

    def __init__(self, columns: tuple[str, ...], mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.columns = columns
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def x0(self, columns: Mapping[str, Tensor], posterior: Tensor | None = None) -> Tensor:
        """Return standardised tokens on their grid, see `Latents.x0`."""
        del posterior
        values, *scale = (columns[name] for name in self.columns)
        tokens = on_grid(
            dequantise(values, *scale) if scale else values.float(), (self.mean.shape[1], self.mean.shape[2])
        )
        return ((tokens - self.mean.to(tokens.device)) / self.std.to(tokens.device)).contiguous()

    def shape(self, columns: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
        """Return the shape of the tokens on their grid."""
        channels, rows, width = self.mean.shape
        return len(columns[self.columns[0]]), channels, rows, width

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return tokens as the teacher gave them, on their grid."""
        return latents * self.std.to(latents.device) + self.mean.to(latents.device)
