"""Statistics of a column over the rows that are trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...data.reading.all_views import read_all_views

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...data.reading.reader import CacheReader

MOST_ROWS = 16_384
_CHUNK = 1024


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
    spaced = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).round().astype(np.int64))
    chosen = rows[spaced]
    spec = reader.manifest.columns[column]
    values = np.empty((len(chosen), len(reader.manifest.views), *spec.shape), np.float64)
    for first in range(0, len(chosen), _CHUNK):
        chunk = chosen[first : first + _CHUNK]
        values[first : first + len(chunk)] = read_all_views(reader, chunk, (column,))[column]
    values = values.reshape(-1, *spec.shape)
    std = values.std(axis=0)
    std[std == 0] = 1
    return torch.from_numpy(values.mean(axis=0)).float(), torch.from_numpy(std).float()
