"""The condition of the network, with its column, draw per step, embedding, and draw when sampling.

The conditioner is a submodule of the backbone (``y_embedder``), so weight averages, checkpoints and the
sampler have it without knowing which one it is. Its randomness is drawn apart from its data (`dropped`, then
`condition`), so that the draws of a step can be made at once and sliced per micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ...data.errors import RepaError
from ...data.format.columns import LABEL, split_column

if TYPE_CHECKING:
    from collections.abc import Callable

DROP_PROBABILITY = 0.1
EMBEDDING_STD = 0.02


class Conditioner(nn.Module, ABC):
    """Question 4 of the method contract.

    Attributes:
        sequence: whether an embedding is a sequence of tokens ``[B, T, D]``, and not one vector ``[B, D]``.
        column: the cache's column that holds the values, ``label`` or ``<source>/<kind>``.
        drop_probability: how often training replaces the condition by the null one, for guidance.
    """

    sequence: ClassVar[bool] = False

    column: str
    drop_probability: float

    def dropped(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw which of the samples lose their condition now, bool ``[B]`` on the generator's device."""
        draws = torch.rand(count, generator=generator, device=generator.device)
        return draws < self.drop_probability

    def draw(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the condition of a training step, ``condition(values, dropped(B, generator))``."""
        return self.condition(values, self.dropped(len(values), generator))

    @abstractmethod
    def condition(self, values: Tensor, dropped: Tensor) -> Tensor:
        """Condition ``[B, …]`` of the column's values ``[B, …]``, null where `dropped` (bool ``[B]``)."""

    @abstractmethod
    def null(self, count: int) -> Tensor:
        """Return the null condition `count` times, ``[B, …]``, on the conditioner's device."""

    @abstractmethod
    def sampling(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw conditions to sample with when none are given, ``[B, …]``, on the conditioner's device."""

    def previewed(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the conditions of a grid of previews, ``[B, …]``, drawn as for any other samples."""
        return self.sampling(count, generator)

    @abstractmethod
    def forward(self, condition: Tensor) -> Tensor:
        """Embed a condition, ``[B, D]`` or ``[B, T, D]`` as `sequence` says."""


class LabelConditioner(Conditioner):
    """Class labels embedded by a table, drawn from N(0, 0.02).

    One extra row, at index ``num_classes``, is the null class.
    """

    column = LABEL

    def __init__(self, num_classes: int, width: int, drop_probability: float = DROP_PROBABILITY) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.drop_probability = drop_probability
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=EMBEDDING_STD)

    def condition(self, values: Tensor, dropped: Tensor) -> Tensor:
        """Return labels int64 ``[B]``, the null class where dropped."""
        return torch.where(dropped.to(values.device), self.num_classes, values.long())

    def null(self, count: int) -> Tensor:
        """Return the null class, int64 ``[B]``."""
        return torch.full((count,), self.num_classes, device=self.embedding_table.weight.device)

    def sampling(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw classes uniformly, int64 ``[B]``."""
        labels = torch.randint(self.num_classes, (count,), generator=generator, device=generator.device)
        return labels.to(self.embedding_table.weight.device)

    def previewed(self, count: int, generator: torch.Generator) -> Tensor:
        """Return every class equally often, int64 ``[B]``."""
        del generator
        return balanced_labels(count, self.num_classes)

    def forward(self, condition: Tensor) -> Tensor:
        """Look up rows of the table, ``[B, D]``."""
        embedding: Tensor = self.embedding_table(condition)
        return embedding


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Return labels int64 ``[count]``, every class equally often, or evenly spread ones of more classes."""
    numbers = torch.arange(count)
    if count >= num_classes:
        return numbers % num_classes
    return numbers * num_classes // count


@dataclass(frozen=True, kw_only=True)
class ConditionColumn:
    """What the conditioner of a column is built from.

    Attributes:
        column: ``label`` or ``<source>/<kind>``.
        shape: of a row, ``()`` for the label.
        num_classes: classes, without the null class.
        width: D, channels of the embedding.
    """

    column: str
    shape: tuple[int, ...]
    num_classes: int
    width: int

    @property
    def kind(self) -> str:
        """The kind of the column, ``label`` for the label.

        Raises:
            RepaError: the column's name is not of the grammar.
        """
        return LABEL if self.column == LABEL else split_column(self.column)[1]

    def build(self) -> Conditioner:
        """Return a conditioner of the column, its parameters drawn from torch's global generator.

        Raises:
            RepaError: nothing embeds columns of that kind.
        """
        if self.kind not in CONDITIONS:
            raise RepaError(
                f"no condition is made of {self.column}",
                f"choose a column of a kind that one is made of: {', '.join(CONDITIONS)}",
                field="condition",
            )
        return CONDITIONS[self.kind](self)


CONDITIONS: dict[str, Callable[[ConditionColumn], Conditioner]] = {
    LABEL: lambda column: LabelConditioner(column.num_classes, column.width),
}
"""Kind of a column → what makes its conditioner: one line each."""
