"""Statistics of a column over the rows that are trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...data.format.int8 import dequantise
from ...data.reading.all_views import read_all_views

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...data.reading.reader import CacheReader

MOST_ROWS = 16_384
MOST_TOKEN_ROWS = 8192
"""Images whose tokens are measured: their mean is known to 1/90 of the deviation, this to 0.8 %."""
_CHUNK = 1024
_TOKEN_CHUNK = 64


def column_statistics(reader: CacheReader, column: str, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of a column of vectors, over all views.

    Of more than `MOST_ROWS` rows that many are read, evenly spaced: the mean is then known to 1/128 of the
    deviation. A channel that never varies has deviation 1, so that it is centred and no more.

    Args:
        reader: of the column.
        column: ``[D]`` a row, of floats.
        rows: rows that are trained on, int64 ``[M]``, at least one.

    Returns:
        float32 ``[D]`` each.

    Raises:
        CacheError: a row cannot be read.
    """
    chosen = _spaced(rows, MOST_ROWS)
    spec = reader.manifest.columns[column]
    values = np.empty((len(chosen), len(reader.manifest.views), *spec.shape), np.float64)
    for first in range(0, len(chosen), _CHUNK):
        chunk = chosen[first : first + _CHUNK]
        values[first : first + len(chunk)] = read_all_views(reader, chunk, (column,))[column]
    values = values.reshape(-1, *spec.shape)
    std = values.std(axis=0)
    std[std == 0] = 1
    return torch.from_numpy(values.mean(axis=0)).float(), torch.from_numpy(std).float()


def token_statistics(
    reader: CacheReader, columns: tuple[str, ...], grid: tuple[int, int], rows: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each position and channel of tokens, over all views.

    Of more than `MOST_TOKEN_ROWS` rows that many are read, evenly spaced. What never varies has deviation 1,
    which the distance from a row finds exactly.
    Rows are read a few at a time, and their distances from the first one summed in float64.

    Args:
        reader: of the columns.
        columns: the column ``[T, D]``, and that of its scales if it is int8.
        grid: rows and columns of the tokens.
        rows: rows that are trained on, int64 ``[M]``, at least one.

    Returns:
        float32 ``[D, h, w]`` each.

    Raises:
        CacheError: a row cannot be read.
    """
    chosen = _spaced(rows, MOST_TOKEN_ROWS)
    origin = total = squares = torch.zeros(())
    count = 0
    for first in range(0, len(chosen), _TOKEN_CHUNK):
        found = read_all_views(reader, chosen[first : first + _TOKEN_CHUNK], columns)
        values, *scale = (torch.from_numpy(found[name]).flatten(0, 1) for name in columns)
        tokens = dequantise(values, *scale) if scale else values
        tokens = tokens.float()
        if not count:
            origin = tokens[0].clone()
            total, squares = (torch.zeros_like(origin, dtype=torch.float64) for _ in range(2))
        tokens = tokens - origin
        total += tokens.sum(0, dtype=torch.float64)
        squares += tokens.square_().sum(0, dtype=torch.float64)
        count += len(tokens)
    shift = total / count
    std = (squares / count - shift.square()).clamp_min_(0).sqrt_()
    std[std == 0] = 1
    mean, std = (on_grid(each, grid).float().contiguous() for each in (origin + shift, std))
    return mean, std


def on_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return row-major tokens ``[…, T, D]`` as a picture ``[…, D, h, w]``, without copying them."""
    return tokens.mT.view(*tokens.shape[:-2], tokens.shape[-1], *grid)


def _spaced(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most so many rows, evenly spaced over them."""
    places = np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(np.int64)
    return rows[np.unique(places)]
