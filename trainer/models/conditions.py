"""What conditions are made of columns, one line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.format.columns import LABEL, TEXT_STATES
from .conditioning import CLS, ClassTokenConditioner, LabelConditioner
from .text_conditioning import TextConditioner

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conditioning import ConditionColumn, Conditioner

CONDITIONS: dict[str, Callable[[ConditionColumn], Conditioner]] = {
    LABEL: lambda column: LabelConditioner(column.num_classes, column.width),
    CLS: lambda column: ClassTokenConditioner(
        column.column,
        column.shape[0],
        column.width,
        mask=column.mask,
        mask_projected=column.mask_projected,
        drop=column.drop,
    ),
    TEXT_STATES: lambda column: TextConditioner(
        column.column, column.shape, column.width, scaled=column.scaled
    ),
}
"""Kind of a column → what makes its conditioner: one line each."""


def build_conditioner(column: ConditionColumn) -> Conditioner:
    """Return a conditioner of a column, its parameters drawn from torch's global generator.

    Raises:
        RepaError: nothing embeds columns of that kind.
    """
    if column.kind not in CONDITIONS:
        raise RepaError(
            f"no condition is made of {column.column}",
            f"choose a column of a kind that one is made of: {', '.join(CONDITIONS)}",
            field="condition",
        )
    conditioner = CONDITIONS[column.kind](column)
    conditioner.built_from = column
    return conditioner
