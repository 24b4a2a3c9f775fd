"""Captions of a cache, to sample with where no prompts are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ...data.errors import RepaError
from ...data.format.captions import EMPTY

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.reading.reader import CacheReader
    from ..models.text_conditioning import TextConditioner


class CaptionBank:
    """The states of every caption but the empty one, read as they are asked for.

    Args:
        reader: of the cache of captions.
        conditioner: whose columns they are.

    Raises:
        RepaError: there is no caption but the empty one.
    """

    def __init__(self, reader: CacheReader, conditioner: TextConditioner) -> None:
        self._reader = reader
        self._conditioner = conditioner
        self.rows: NDArray[np.int64] = reader.valid_rows[reader.valid_rows != EMPTY]
        if not len(self.rows):
            raise RepaError(f"{reader.path} has no captions", "give --prompt", field="--prompt")

    def __len__(self) -> int:
        """Count the captions."""
        return len(self.rows)

    def vectors(self, rows: Tensor) -> Tensor:
        """Return the states float32 ``[n, S, E]`` of captions by number, int64 ``[n]``.

        Raises:
            CacheError: they cannot be read.
        """
        return self._states(self.rows[rows.numpy()])

    def empty(self) -> Tensor:
        """Return the states of the empty caption, float32 ``[S, E]``.

        Raises:
            CacheError: they cannot be read.
        """
        return self._states(np.array([EMPTY]))[0]

    def _states(self, rows: NDArray[np.int64]) -> Tensor:
        columns, specs = self._conditioner.columns, self._reader.manifest.columns
        # each row once, in the order of the files
        wanted, places = np.unique(rows, return_inverse=True)
        out = {name: np.empty((len(wanted), *specs[name].shape), specs[name].numpy_dtype) for name in columns}
        self._reader.read_rows(wanted, columns, out)
        named = {name: torch.from_numpy(values) for name, values in out.items()}
        states = self._conditioner.values(named, torch.empty(0))
        return states.float()[torch.from_numpy(places)]
