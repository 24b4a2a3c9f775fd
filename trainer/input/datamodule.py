"""The cache as Lightning's data, a stream of micro-batches whose state is the images seen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule

from ...data.format.columns import LABEL, MOMENTS
from ...data.machine import reading_threads
from ...data.reading.loader import Batch, CacheLoader
from ...data.tars.cache import TarCache
from .online import live_columns, read_columns, with_targets
from .tar_stream import TarLoader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    import torch
    from lightning.pytorch import Trainer
    from numpy.typing import NDArray

    from ...data.reading.reader import CacheReader
    from ..config import TrainConfig
    from ..methods.base import Method, Phase
    from .online import LiveTargets


def columns_of_phase(
    method: Method, phase: Phase, condition: Sequence[str], latents: Sequence[str] = (MOMENTS,)
) -> tuple[str, ...]:
    """List the columns that a phase reads, without the label.

    Args:
        method: the method.
        phase: one of its phases.
        condition: columns of the conditioner.
        latents: columns that latents are made of.
    """
    beside = (each.column for each in method.denoised())
    names = (*latents, *condition, *method.columns(phase), *beside)
    return tuple(dict.fromkeys(name for name in names if name != LABEL))


class CacheData(LightningDataModule):
    """Training batches of a cache, their targets read from it or computed live.

    Args:
        config: of the run.
        reader: of every column that some phase reads.
        rows: rows to train on, int64 ``[M]``.
        columns_at: step → columns of its phase.
        live: computes targets; it is not called in phases that need none of its columns.
    """

    def __init__(
        self,
        config: TrainConfig,
        reader: CacheReader | TarCache,
        rows: NDArray[np.int64],
        columns_at: Callable[[int], Sequence[str]],
        live: LiveTargets | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._reader = reader
        self._rows = rows
        self._columns_at = columns_at
        self._live = live
        self._images_seen = 0
        self._stream: _Stream | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"images_seen": …}`` of the steps that were trained on.

        The loader itself is further ahead.
        """
        trainer = self.trainer
        steps = trainer.global_step if trainer is not None else 0
        return {"images_seen": steps * self._config.batch_size}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the images seen."""
        self._images_seen = state_dict["images_seen"]

    def begin_at(self, step: int) -> None:
        """Go on after so many steps that another run has made."""
        self._images_seen = step * self._config.batch_size

    def train_dataloader(self) -> Iterator[Batch]:
        """Return the micro-batches of this rank without end, as the trainer counts the steps."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("the data belongs to no trainer yet")
        self._stream = _Stream(self._loader(trainer), self._prepare)
        return self._stream

    def _loader(self, trainer: Trainer) -> CacheLoader | TarLoader:
        pin_memory = trainer.strategy.root_device.type == "cuda"
        if isinstance(self._reader, TarCache):
            return TarLoader(
                self._reader,
                batch_size=self._config.batch_size,
                columns_at=self._columns_at,
                rank=trainer.global_rank,
                world=trainer.world_size,
                accumulate=self._config.accumulate,
                seed=self._config.seed,
                buffer=self._config.shuffle_buffer,
                images_seen=self._images_seen,
                pin_memory=pin_memory,
            )
        return CacheLoader(
            self._reader,
            rows=self._rows,
            batch_size=self._config.batch_size,
            rank=trainer.global_rank,
            world=trainer.world_size,
            accumulate=self._config.accumulate,
            seed=self._config.seed,
            order=self._config.order,
            images_seen=self._images_seen,
            columns_at=lambda step: read_columns(self._columns_at(step), self._live),
            threads=reading_threads(self._config.threads, trainer.num_devices),
            pin_memory=pin_memory,
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch and add its live targets.

        Lightning's own transfer walks and copies dataclasses field by field.
        """
        del dataloader_idx
        columns = {name: values.to(device, non_blocking=True) for name, values in batch.columns.items()}
        moved = replace(batch, label=batch.label.to(device, non_blocking=True), columns=columns)
        wanted = live_columns(self._columns_at(batch.step), self._live)
        return with_targets(moved, self._live, wanted) if self._live is not None and wanted else moved

    def _prepare(self, batch: Batch) -> None:
        """Let the images of a batch be decoded while the one before it is trained on."""
        if self._live is not None and live_columns(self._columns_at(batch.step), self._live):
            self._live.prepare(batch.rows.numpy())

    def teardown(self, stage: str) -> None:
        """End the loader's threads."""
        del stage
        if self._stream is not None:
            self._stream.close()


class _Stream:
    """A loader without a length or state. Lightning would save the state of what it has read ahead."""

    def __init__(self, loader: CacheLoader | TarLoader, ahead: Callable[[Batch], None]) -> None:
        self._loader = loader
        self._ahead = ahead
        self._iterator: Iterator[Batch] | None = None

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Batch:
        # not in __iter__, which Lightning also calls to see whether this can be iterated
        if self._iterator is None:
            self._iterator = iter(self._loader)
        batch = next(self._iterator)
        # Lightning asks for a batch before it trains on the one before
        self._ahead(batch)
        return batch

    def close(self) -> None:
        self._loader.close()
