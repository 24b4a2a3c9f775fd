"""Gradients of many tensors compared, as one vector each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


def cosine(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Compute the cosine of two lists of tensors taken as one vector each, in float64.

    It is 0 if one of them is zero.
    """
    norms = (_dot(first, first) * _dot(second, second)).sqrt()
    return torch.where(norms > 0, _dot(first, second) / torch.where(norms > 0, norms, 1.0), 0.0)


def relative_difference(values: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:
    """Compute ‖values − exact‖ / ‖exact‖ of two lists of tensors taken as one vector each, in float64.

    It is 0 where the two are equal, if both are zero too.
    """
    # one tensor at a time: a list of float64 differences would be twice as large as the gradient
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(values, exact, strict=True)]
    difference = torch.stack(squares).sum().sqrt()
    return torch.where(difference > 0, difference / _dot(exact, exact).sqrt(), 0.0)


def _dot(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(some, others, strict=True)]).sum()
