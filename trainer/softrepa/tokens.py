"""The soft tokens, all that SoftREPA trains, and how they depend on time."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from ..models.stable_diffusion import STEPS

BINS = 100
"""Rows of the time table."""

MOST_NUMBERS = 1_000_000
"""The method is one of few numbers: as many are never trained."""

START_STD = 0.02
_WIDTH = STEPS // BINS

Count: TypeAlias = Annotated[int, Ge(1), Le(10**6)]
Start: TypeAlias = Literal["bos", "normal", "as_released"]
TimeStart: TypeAlias = Literal["normal", "zero"]


class SoftTokens(nn.Module):
    """The tokens of a denoiser and a table of what is added to them at a time (arXiv 2503.08250).

    Args:
        tokens: first values, ``[n, D]`` for a U-Net, ``[L, n, D]`` for L blocks of Stable Diffusion 3.
        time_table: first values ``[100, D]``, or ``[100, L·D]``, block by block; None for tokens that are the
            same at all times.
        interpolate: whether a time between the middles of two bins gets both rows, by its distance.

    Raises:
        ValueError: the shapes do not fit.
    """

    def __init__(self, tokens: Tensor, time_table: Tensor | None, *, interpolate: bool = False) -> None:
        super().__init__()
        layers = tokens.shape[0] if tokens.ndim == 3 else 1
        expected = (BINS, layers * tokens.shape[-1])
        if tokens.ndim not in (2, 3) or (time_table is not None and tuple(time_table.shape) != expected):
            raise ValueError(f"a time table {expected} belongs to tokens {tuple(tokens.shape)}")
        self.tokens = nn.Parameter(tokens.clone())
        self.time_table = None if time_table is None else nn.Parameter(time_table.clone())
        self.interpolate = interpolate

    def forward(self, t: Tensor) -> Tensor:
        """Return the tokens of times, ``[B, n, D]`` or ``[B, L, n, D]``.

        Args:
            t: times in steps of the chain, in [0, 1000], of any dtype, ``[B]``.
        """
        own = self.tokens.expand(len(t), *self.tokens.shape)
        if self.time_table is None:
            return own
        rows = self._between(t) if self.interpolate else self.time_table[bins_of(t)]
        # [B, D] → [B, 1, D], and [B, L·D] → [B, L, 1, D]
        return own + rows.reshape(len(t), *self.tokens.shape[:-2], 1, self.tokens.shape[-1])

    def _between(self, t: Tensor) -> Tensor:
        assert self.time_table is not None, "the caller has looked"
        place = (t.to(self.time_table.dtype) / _WIDTH - 0.5).clamp(0, BINS - 1)
        low = place.floor().long()
        share = (place - low)[:, None]
        return (1 - share) * self.time_table[low] + share * self.time_table[(low + 1).clamp(max=BINS - 1)]


def bins_of(t: Tensor) -> Tensor:
    """Return the bin min(⌊⌊t⌋/10⌋, 99) of each time, int64 ``[B]``.

    Each by itself: as released, one time of 1000 moves the bins of all others in the batch.
    """
    return (t.long() // _WIDTH).clamp(max=BINS - 1)


def first_tokens(
    shape: tuple[int, ...],
    start: Start,
    generator: torch.Generator,
    *,
    bos: Tensor | None = None,
) -> Tensor:
    """Return the first values of the tokens.

    Args:
        shape: ``[n, D]`` or ``[L, n, D]``.
        start: ``normal``, N(0, 0.02); ``bos``, all as the first text state of the empty caption, and that
            much noise, without which tokens that begin equal stay equal; ``as_released``, without.
        generator: of the noise.
        bos: that state ``[D]``, which ``normal`` does not need.
    """
    noise = START_STD * torch.randn(shape, generator=generator)
    if start == "normal":
        return noise
    assert bos is not None, "the caller has looked"
    equal = bos.float().expand(shape)
    return equal.clone() if start == "as_released" else equal + noise


def first_time_table(shape: tuple[int, ...], start: TimeStart, generator: torch.Generator) -> Tensor:
    """Return the first values of the time table of tokens of a shape, ``[100, D]`` or ``[100, L·D]``.

    Args:
        shape: of the tokens.
        start: ``normal``, N(0, 0.02), or ``zero``.
        generator: of the noise.
    """
    layers = shape[0] if len(shape) == 3 else 1
    table = START_STD * torch.randn(BINS, layers * shape[-1], generator=generator)
    return torch.zeros_like(table) if start == "zero" else table


def numbers_of(shape: tuple[int, ...], *, time_table: bool) -> int:
    """Count the numbers that tokens of a shape and their table train."""
    layers = shape[0] if len(shape) == 3 else 1
    tokens = layers * shape[-2] * shape[-1]
    return tokens + (BINS * layers * shape[-1] if time_table else 0)
