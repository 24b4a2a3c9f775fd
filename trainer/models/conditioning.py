"""The condition of the network, with its column, draw per step, embedding, and draw when sampling.

The conditioner is a submodule of the backbone (``y_embedder``), so weight averages, checkpoints and the
sampler have it without knowing which one it is. Its randomness is drawn apart from its data (`dropped`, then
`condition`), so that the draws of a step can be made at once and sliced per micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.errors import RepaError
from ...data.format.columns import LABEL, split_column

if TYPE_CHECKING:
    from collections.abc import Mapping

DROP_PROBABILITY = 0.1
MASK_PROBABILITY = 0.4
CLS = "cls"
EMBEDDING_STD = 0.02


class Bank(Protocol):
    """Vectors that samples are conditioned on, a row for each image that they are of."""

    def __len__(self) -> int:
        """Count the rows."""
        ...

    def vectors(self, rows: Tensor) -> Tensor:
        """Return the vectors float32 ``[n, D]`` of rows int64 ``[n]`` on the CPU, of any length.

        Raises:
            RepaError: they cannot be read.
        """
        ...


class Conditioner(nn.Module, ABC):
    """Question 4 of the method contract.

    Attributes:
        sequence: whether an embedding is a sequence of tokens ``[B, T, D]``, and not one vector ``[B, D]``.
        column: the cache's column that holds the values, ``label`` or ``<source>/<kind>``.
        drop_probability: how often training replaces the condition by the null one, for guidance.
        built_from: what a checkpoint keeps to build it again; None where the kind of its column says nothing.
    """

    sequence: ClassVar[bool] = False

    column: str
    drop_probability: float
    built_from: ConditionColumn | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the cache that the values are read from, without the label."""
        return () if self.column == LABEL else (self.column,)

    def values(self, columns: Mapping[str, Tensor], label: Tensor) -> Tensor:
        """Return the values ``[B, …]`` of a batch.

        Args:
            columns: of the batch, as stored.
            label: classes, int64 ``[B]``.
        """
        return label if self.column == LABEL else columns[self.column]

    def dropped(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw what the samples lose of their condition now, on the generator's device.

        It is bool ``[B]``, or ``[B, n]`` where parts are lost.
        """
        draws = torch.rand(count, generator=generator, device=generator.device)
        return draws < self.drop_probability

    def draw(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the condition of a training step, ``condition(values, dropped(B, generator))``."""
        return self.condition(values, self.dropped(len(values), generator))

    @abstractmethod
    def condition(self, values: Tensor, dropped: Tensor) -> Tensor:
        """Condition ``[B, …]`` of the column's values ``[B, …]``, null where `dropped` (bool ``[B]``)."""

    def whole(self, values: Tensor) -> Tensor:
        """Return the condition ``[B, …]`` of which nothing is lost, as it is when sampling."""
        return self.condition(values, torch.zeros(len(values), dtype=torch.bool, device=values.device))

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


class ClassTokenConditioner(Conditioner):
    """A teacher's class token of the image itself, at unit length, projected (GMem, arXiv 2412.08781).

    e = W·c + b with c = s / ‖s‖. Training drops elements of c and divides the others by 1 − p, or, as GMem's
    first version, elements of e; when sampling nothing is dropped. A condition is c ``[B, D]``, or c and the
    factors of e ``[B, D + width]``. The null condition is c = 0.

    Args:
        column: ``<teacher>/cls``.
        tokens: D, channels of the class token.
        width: channels of the embedding.
        mask: p, how often an element is dropped.
        mask_projected: drop elements of e, and not of c.
        drop: how often the whole of c is (ours: without it the null condition is never trained).
    """

    def __init__(
        self,
        column: str,
        tokens: int,
        width: int,
        *,
        mask: float = MASK_PROBABILITY,
        mask_projected: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.column = column
        self.mask = mask
        self.mask_projected = mask_projected
        self.drop_probability = drop
        self.bank: Bank | None = None
        self.linear = nn.Linear(tokens, width)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def dropped(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw which elements are lost, bool ``[B, D]`` or ``[B, width]``, all of them where the whole is."""
        device = generator.device
        whole = torch.rand(count, 1, generator=generator, device=device) < self.drop_probability
        elements = self.linear.out_features if self.mask_projected else self.linear.in_features
        return whole | (torch.rand(count, elements, generator=generator, device=device) < self.mask)

    def condition(self, values: Tensor, dropped: Tensor) -> Tensor:
        """Return class tokens ``[B, D]`` at unit length and masked, in float32 or better.

        Args:
            values: as stored ``[B, D]``.
            dropped: of `dropped`.
        """
        dropped = dropped.to(values.device)
        unit, kept = self._unit(values), ~dropped
        factors = kept.to(unit) / (1 - self.mask) if self.mask < 1 else kept.to(unit)
        if not self.mask_projected:
            return unit * factors
        none = dropped.all(dim=1, keepdim=True)
        return torch.cat([torch.where(none, 0, unit), torch.where(none, 1, factors)], dim=1)

    def whole(self, values: Tensor) -> Tensor:
        """Return class tokens ``[B, D]`` at unit length, in float32 or better."""
        unit = self._unit(values)
        if not self.mask_projected:
            return unit
        return torch.cat([unit, unit.new_ones(len(unit), self.linear.out_features)], dim=1)

    def null(self, count: int) -> Tensor:
        """Return zeros, whose embedding is b."""
        zeros = torch.zeros(count, self.linear.in_features, device=self.linear.weight.device)
        return self.whole(zeros)

    def sampling(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw rows of the bank uniformly, with replacement.

        Raises:
            RepaError: there is no bank, or it cannot be read.
        """
        if self.bank is None:
            raise RepaError(
                f"the model is conditioned on {self.column} of images, and nothing says of which",
                "train from a cache that is no tars, or sample with `repa sample --bank`",
                field="--bank",
            )
        rows = torch.randint(len(self.bank), (count,), generator=generator, device=generator.device)
        return self.whole(self.bank.vectors(rows.cpu())).to(self.linear.weight.device)

    def forward(self, condition: Tensor) -> Tensor:
        """Project, ``[B, width]``."""
        if not self.mask_projected:
            embedding: Tensor = self.linear(condition.to(self.linear.weight.dtype))
            return embedding
        parts = [self.linear.in_features, self.linear.out_features]
        unit, factors = torch.split(condition.to(self.linear.weight.dtype), parts, dim=1)
        embedding = self.linear(unit) * factors
        return embedding

    def _unit(self, values: Tensor) -> Tensor:
        dtype = torch.promote_types(values.dtype, torch.float32)
        return F.normalize(values.to(dtype), dim=1)


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
        mask: of a class token, as are the next two, see `ClassTokenConditioner`.
        mask_projected: drop elements of its embedding.
        drop: how often training drops the whole of it.
        scaled: whether the rows are int8 with scales in a column of their own.
    """

    column: str
    shape: tuple[int, ...]
    num_classes: int
    width: int
    mask: float = MASK_PROBABILITY
    mask_projected: bool = False
    drop: float = 0.0
    scaled: bool = False

    @property
    def kind(self) -> str:
        """The kind of the column, ``label`` for the label.

        Raises:
            RepaError: the column's name is not of the grammar.
        """
        return LABEL if self.column == LABEL else split_column(self.column)[1]
