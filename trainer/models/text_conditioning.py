"""Text as a condition, a sequence of a text encoder's states, which stage 1 stored for each caption."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...data.errors import RepaError
from ...data.format.columns import scale_column
from ...data.format.int8 import dequantise
from .conditioning import DROP_PROBABILITY, Conditioner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .conditioning import Bank


class TextConditioner(Conditioner):
    """States of a caption, mapped linearly to the width of the network (as in MM-DiT, arXiv 2403.03206).

    The null condition is what the encoder makes of the empty caption. It is a buffer, so that checkpoints
    have it, and is zero until `take_null`.

    Args:
        column: of the states.
        shape: of a row, ``(S, E)``.
        width: D, channels of a token of the network.
        scaled: whether the states are int8, with scales in a column of their own.

    Attributes:
        bank: states of captions to sample with where no prompts are given.
    """

    sequence = True

    null_states: Tensor

    def __init__(self, column: str, shape: tuple[int, ...], width: int, *, scaled: bool = False) -> None:
        super().__init__()
        self.column = column
        self.scaled = scaled
        self.drop_probability = DROP_PROBABILITY
        self.bank: Bank | None = None
        self.register_buffer("null_states", torch.zeros(shape))
        self.proj = nn.Linear(shape[1], width)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the states, and of their scales where there are any."""
        return (self.column, scale_column(self.column)) if self.scaled else (self.column,)

    def values(self, columns: Mapping[str, Tensor], label: Tensor) -> Tensor:
        """Return the states ``[B, S, E]`` of a batch, in floating point."""
        del label
        stored = [columns[name] for name in self.columns]
        return dequantise(*stored) if self.scaled else stored[0]

    def take_null(self, values: Tensor) -> None:
        """Take the states of the empty caption ``[S, E]`` as null condition."""
        self.null_states.copy_(values)

    def condition(self, values: Tensor, dropped: Tensor) -> Tensor:
        """Return states ``[B, S, E]``, in float32 or better, those of the empty caption where dropped.

        Args:
            values: as stored ``[B, S, E]``.
            dropped: bool ``[B]``.
        """
        states = values.to(torch.promote_types(values.dtype, self.null_states.dtype))
        return torch.where(dropped.to(values.device)[:, None, None], self.null_states.to(states), states)

    def null(self, count: int) -> Tensor:
        """Return the states of the empty caption `count` times, ``[B, S, E]``."""
        return self.null_states.expand(count, -1, -1)

    def sampling(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw captions of the bank uniformly, with replacement.

        Raises:
            RepaError: there is no bank, or it cannot be read.
        """
        if self.bank is None:
            raise RepaError(
                f"the model is conditioned on {self.column}, and no text was given",
                "give --prompt, or a cache whose captions to take with --bank",
                field="--prompt",
            )
        rows = torch.randint(len(self.bank), (count,), generator=generator, device=generator.device)
        return self.bank.vectors(rows.cpu()).to(self.null_states.device)

    def forward(self, condition: Tensor) -> Tensor:
        """Map states ``[B, S, E]`` to tokens ``[B, S, D]``."""
        tokens: Tensor = self.proj(condition.to(self.proj.weight.dtype))
        return tokens
