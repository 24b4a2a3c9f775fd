"""The batches of an opened cache, for a training loop that is not ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import RepaError
from ..format.columns import LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from .loader import CacheLoader

ROWS = "rows"
VIEWS = "views"


class BatchLoader(IterableDataset[dict[str, "Tensor"]]):
    """Batches as dictionaries, in the exact order of a seed and from any step on.

    A batch has ``label``, ``rows``, the rows' numbers in the cache, and ``views``, which view of each all its
    columns are of, int64 ``[b]``, and column → values ``[b, *shape]`` as stored. It is its own prefetcher,
    with threads that hold no lock. Iterate over it as it is, or by a ``DataLoader(loader, batch_size=None)``
    without workers.

    Args:
        loader: reads them.
    """

    def __init__(self, loader: CacheLoader) -> None:
        super().__init__()
        self._loader = loader

    @property
    def step(self) -> int:
        """Steps whose batches were all handed out, those before the start included."""
        return self._loader.images_seen // self._loader.batch_size

    def state_dict(self) -> dict[str, int]:
        """Return where it stands, to be saved with the weights."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            RepaError: it is none of this loader's.
        """
        if not isinstance(state.get("images_seen"), int):
            raise RepaError(
                "the state of the loader has no images_seen", "load what `state_dict` returned", field="state"
            )
        self._loader.load_state_dict({"images_seen": state["images_seen"]})

    def __len__(self) -> int:
        """Count the batches from step 0 to the last.

        Raises:
            TypeError: there is no last step.
        """
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if get_worker_info() is not None:
            raise RepaError(
                "the loader of a cache reads with threads of its own, and each worker would read every batch",
                "set num_workers=0",
                field="num_workers",
            )
        for batch in self._loader:
            yield {LABEL: batch.label, ROWS: batch.rows, VIEWS: batch.views, **batch.columns}

    def close(self) -> None:
        """End its threads. Iterating again begins anew, where it stood."""
        self._loader.close()


def process_of(rank: int | None, world: int | None) -> tuple[int, int]:
    """Return which of how many processes this is, as given or as ``torch.distributed`` has it.

    Raises:
        RepaError: one of the two is given alone.
    """
    if (rank is None) != (world is None):
        raise RepaError(
            "rank and world belong together",
            "give both or neither",
            field="rank" if rank is None else "world",
        )
    if rank is not None and world is not None:
        return rank, world
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
