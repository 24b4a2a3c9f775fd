"""What `repa parity` finds of losses, gradients and columns."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class TermParity:
    """A part of the loss on both sides, a value per batch.

    Attributes:
        cached: from the cache.
        live: from the live teacher.
        gradient_cosine: of the two gradients with respect to all parameters of the backbone, as one vector
            each; 1 where they are equal. Empty of a term that is only logged.
        gradient_difference: the norm of their difference, as a share of the live one's; empty likewise.
    """

    cached: list[float] = field(default_factory=list)
    live: list[float] = field(default_factory=list)
    gradient_cosine: list[float] = field(default_factory=list)
    gradient_difference: list[float] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """Largest absolute difference of a batch."""
        return max(abs(a - b) for a, b in zip(self.cached, self.live, strict=True))


@dataclass(kw_only=True)
class ColumnParity:
    """A column as stored against the exact one.

    Attributes:
        stored: the form in which it is stored, for people.
        largest: largest absolute difference of an element; None where the form keeps other numbers, and only
            the attention maps can be compared.
        cosine_error: mean of 1 − cosine over the vectors of the last axis; None likewise.
        kl_mean: of queries and keys: KL(teacher ‖ stored) of their attention in nats, the mean over images,
            blocks, heads and query rows; None of tokens.
        kl_worst_head: its largest mean of a block and head; None likewise.
    """

    stored: str
    largest: float | None = None
    cosine_error: float | None = None
    kl_mean: float | None = None
    kl_worst_head: float | None = None


@dataclass(kw_only=True)
class Parity:
    """What `parity` found of one view of the images.

    Attributes:
        terms: name → both sides; ``loss`` is the weighted sum.
        columns: targets by name.
    """

    terms: dict[str, TermParity] = field(default_factory=dict)
    columns: dict[str, ColumnParity] = field(default_factory=dict)
