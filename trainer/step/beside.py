"""What is denoised beside the latent, from its column over its noise to its terms of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..methods.base import Denoised, Term
from ..models.capture import Captured

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..objectives.base import Noised, Objective

Statistics = tuple[Tensor, Tensor]
"""Mean and standard deviation of each channel, float32 ``[D]`` each."""


class Beside(nn.Module):
    """The vectors that a method denoises beside the latent, none for most.

    The statistics of those that are standardised are buffers, so that checkpoints have them.

    Args:
        vectors: what the method denoises.
        statistics: name → mean and deviation of each that is standardised.
    """

    def __init__(self, vectors: Sequence[Denoised], statistics: Mapping[str, Statistics]) -> None:
        super().__init__()
        self.vectors = tuple(vectors)
        for name, (mean, std) in statistics.items():
            self.register_buffer(f"{name}_mean", mean)
            self.register_buffer(f"{name}_std", std)
        self._standardised = frozenset(statistics)

    @property
    def widths(self) -> dict[str, int]:
        """Name → channels."""
        return {each.name: each.width for each in self.vectors}

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that the values come from."""
        return tuple(each.column for each in self.vectors)

    def terms_of(self, terms: Sequence[str]) -> tuple[str, ...]:
        """Name the terms of the loss that the vectors have, given those of the latent."""
        return tuple(f"{each.name}_{term}" for each in self.vectors for term in terms)

    def values(self, vector: Denoised, columns: Mapping[str, Tensor]) -> Tensor:
        """Return what is denoised of a batch's columns as stored, float32 ``[B, D]``."""
        values = columns[vector.column].float()
        if vector.name not in self._standardised:
            return values
        mean, std = (self.get_buffer(f"{vector.name}_{each}") for each in ("mean", "std"))
        return (values - mean) / std

    def noised(
        self, columns: Mapping[str, Tensor], noises: Mapping[str, Tensor], t: Tensor, objective: Objective
    ) -> dict[str, Noised]:
        """Noise the vectors of a batch.

        Args:
            columns: of the batch, as stored, where `t` is.
            noises: name → ε ``[B, D]``.
            t: times ``[B]``.
            objective: of the run.
        """
        return {
            each.name: objective.noised(self.values(each, columns), noises[each.name], t)
            for each in self.vectors
        }

    def losses(
        self, captured: Captured, noised: Mapping[str, Noised], objective: Objective
    ) -> dict[str, dict[str, Tensor]]:
        """Return name → the objective's terms of that vector per sample, ``[B]``.

        Args:
            captured: what the network returned.
            noised: what it was given, see `noised`.
            objective: of the run.
        """
        return {
            each.name: dict(objective.losses(Captured(prediction=prediction), noised[each.name]))
            for each, prediction in zip(self.vectors, captured.tokens, strict=True)
        }

    def terms(
        self, captured: Captured, noised: Mapping[str, Noised], objective: Objective
    ) -> dict[str, Term]:
        """Return the terms of the loss, named as by `terms_of`, see `losses` for the arguments."""
        losses = self.losses(captured, noised, objective)
        return {
            f"{each.name}_{term}": Term(value=values.mean(), weight=each.weight)
            for each in self.vectors
            for term, values in losses[each.name].items()
        }


def tokens_of(noised: Mapping[str, Noised], t: Tensor, objective: Objective) -> tuple[Tensor, ...]:
    """Return the vectors ``[B, D]`` of other times ``[B]``, of the same values and noise."""
    return tuple(objective.interpolate(each.x0, each.noise, t) for each in noised.values())
