"""Batches of one shard, grouped so that bytes do not depend on which process computes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from ...data.format.manifest import Manifest

    Decoded = NDArray[np.uint8] | str


@dataclass(kw_only=True)
class Batch:
    """Images of one shard that are computed together.

    Attributes:
        shard: the shard.
        rows: its B rows, ascending; a shard's last batch may have none.
        images: their pixels, each uint8 ``[3, R, R]``.
        invalid: rows met since the batch before that could not be decoded, row → reason.
        last: whether it completes the shard.
    """

    shard: int
    rows: list[int] = field(default_factory=list)
    images: list[NDArray[np.uint8]] = field(default_factory=list)
    invalid: dict[int, str] = field(default_factory=dict)
    last: bool = False


def batches(decoded: Iterable[tuple[int, Decoded]], manifest: Manifest, batch_size: int) -> Iterator[Batch]:
    """Group decoded rows into batches that restart at each shard.

    A forward pass may round differently with another batch size, so which images share a batch must be a
    function of the shard alone: its decodable rows in order, ``batch_size`` at a time, the rest last.

    Args:
        decoded: (row, pixels uint8 ``[3, R, R]`` or the reason why there are none), whole shards one after
            the other, the rows of each ascending.
        manifest: of the cache, for the shards' rows.
        batch_size: B of every batch but a shard's last.
    """
    batch: Batch | None = None
    for row, image in decoded:
        shard = row // manifest.shard_rows
        if batch is None:
            batch = Batch(shard=shard)
        if isinstance(image, str):
            batch.invalid[row] = image
        else:
            batch.rows.append(row)
            batch.images.append(image)
        batch.last = row == manifest.shard_range(shard)[-1]
        if batch.last or len(batch.rows) == batch_size:
            yield batch
            batch = None
