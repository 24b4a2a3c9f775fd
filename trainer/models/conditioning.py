"""What conditions the network: a column, its draw per step, its embedding, its draw when sampling.

The conditioner is a submodule of the backbone (``y_embedder``), so weight averages, checkpoints and the
sampler have it without knowing which one it is. Its randomness is drawn apart from its data (`dropped`, then
`condition`), so that the draws of a step can be made at once and sliced per micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ...data.format.columns import LABEL

DROP_PROBABILITY = 0.1
EMBEDDING_STD = 0.02


class Conditioner(nn.Module, ABC):
    """Question 4 of the method contract.

    Attributes:
        column: the cache's column that holds the values, ``label`` or ``<source>/<kind>``.
        drop_probability: how often training replaces the condition by the null one, for guidance.
    """

    column: str
    drop_probability: float

    def dropped(self, count: int, generator: torch.Generator) -> Tensor:
        """Which of the samples lose their condition in this step: bool ``[B]`` on the generator's device."""
        draws = torch.rand(count, generator=generator, device=generator.device)
        return draws < self.drop_probability

    def draw(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Condition of a training step: ``condition(values, dropped(B, generator))``."""
        return self.condition(values, self.dropped(len(values), generator))

    @abstractmethod
    def condition(self, values: Tensor, dropped: Tensor) -> Tensor:
        """Condition ``[B, …]`` of the column's values ``[B, …]``, null where `dropped` (bool ``[B]``)."""

    @abstractmethod
    def null(self, count: int) -> Tensor:
        """The null condition `count` times, ``[B, …]``, on the conditioner's device."""

    @abstractmethod
    def sampling(self, count: int, generator: torch.Generator) -> Tensor:
        """Conditions to sample with when none are given, ``[B, …]``, on the conditioner's device."""

    @abstractmethod
    def forward(self, condition: Tensor) -> Tensor:
        """Embedding ``[B, D]`` of a condition."""


class LabelConditioner(Conditioner):
    """Class labels: a table, N(0, 0.02), with one extra row, the null class, at index ``num_classes``."""

    column = LABEL

    def __init__(self, num_classes: int, width: int, drop_probability: float = DROP_PROBABILITY) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.drop_probability = drop_probability
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=EMBEDDING_STD)

    def condition(self, values: Tensor, dropped: Tensor) -> Tensor:
        """Labels int64 ``[B]``, the null class where dropped."""
        return torch.where(dropped.to(values.device), self.num_classes, values.long())

    def null(self, count: int) -> Tensor:
        """The null class, int64 ``[B]``."""
        return torch.full((count,), self.num_classes, device=self.embedding_table.weight.device)

    def sampling(self, count: int, generator: torch.Generator) -> Tensor:
        """Classes drawn uniformly, int64 ``[B]``."""
        labels = torch.randint(self.num_classes, (count,), generator=generator, device=generator.device)
        return labels.to(self.embedding_table.weight.device)

    def forward(self, condition: Tensor) -> Tensor:
        """Rows of the table, ``[B, D]``."""
        embedding: Tensor = self.embedding_table(condition)
        return embedding
