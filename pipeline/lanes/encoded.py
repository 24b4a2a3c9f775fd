"""What a computed batch is, on its way from the device to the writer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """What one batch of one shard has become.

    Attributes:
        shard: the shard its rows belong to; the batches of a shard come one after the other.
        sources: sources that are written in this shard.
        rows: its B rows, ascending.
        invalid: rows met on the way that could not be decoded, row → reason.
        columns: column → values ``[B, V, *shape]`` in the storage dtype, of every source in ``sources``.
        finite: column → bool ``[B]``, whether all values of a row, in all views, are finite in the storage
            dtype.
        last: whether the shard is complete with this batch.
    """

    shard: int
    sources: tuple[str, ...]
    rows: Sequence[int]
    invalid: Mapping[int, str]
    columns: Mapping[str, NDArray[np.generic]]
    finite: Mapping[str, NDArray[np.bool_]]
    last: bool


@dataclass(frozen=True)
class Result:
    """A computed batch, on the host.

    Attributes:
        batch: ready to be written.
        seconds: model → seconds the device was busy with it.
    """

    batch: EncodedBatch
    seconds: Mapping[str, float]


class Pending(Protocol):
    """A batch that is being computed."""

    def ready(self, timeout: float) -> bool:
        """Tell whether it is computed, after waiting for so many seconds at most."""
        ...

    def result(self) -> Result:
        """Return the computed batch. It waits for it, and raises what went wrong."""
        ...
