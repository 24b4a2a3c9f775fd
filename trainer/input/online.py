"""Online targets, where the teacher runs in the step instead of being read from the cache, as the reference.

Latents, labels and the conditioner's column still come from the cache, so that order, draws and the held-out
loss are those of the cached run, and the two differ in nothing but where the targets come from. A method
cannot tell: the columns have the names that a cache would give them, exact and in float32.

Nothing here computes a target. What does is injected by whoever may know both stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ...data.format.columns import SCALE_SUFFIX, split_column

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.format.columns import ColumnSpec
    from ...data.format.manifest import Manifest, Provenance
    from ...data.reading.loader import Batch

TARGET_KINDS = ("patch", "q", "k")
"""Kinds of columns that are computed live; class vectors, which condition a network, are read."""


class LiveTargets(Protocol):
    """Teachers that compute the columns of rows of the cache on demand.

    Attributes:
        columns: name → spec of the columns that it computes, all float32, of kinds in `TARGET_KINDS`.
        grids: source → rows and columns of its tokens.
        notes: source → what its provenance notes.
        record: plain values for ``run.json``: which images and teachers, enough to start it again.
    """

    @property
    def columns(self) -> Mapping[str, ColumnSpec]: ...  # noqa: D102
    @property
    def grids(self) -> Mapping[str, tuple[int, int]]: ...  # noqa: D102
    @property
    def notes(self) -> Mapping[str, Mapping[str, Any]]: ...  # noqa: D102
    @property
    def record(self) -> Mapping[str, Any]: ...  # noqa: D102

    def load(self, device: torch.device) -> Mapping[str, Provenance]:
        """Load the teachers, once, before the first call.

        Args:
            device: the training device of this process.

        Returns:
            Source → what computes it.

        Raises:
            RepaError: weights that are not there, or not those that the cache was written with.
        """
        ...

    def prepare(self, rows: NDArray[np.int64]) -> None:
        """Begin to decode the images of rows that will be asked for soon, and do not wait."""
        ...

    def __call__(
        self, rows: NDArray[np.int64], names: Sequence[str], views: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        """Compute columns of some rows.

        Args:
            rows: rows of the cache, int64 ``[B]``, none of them invalid.
            names: which of its columns; nothing else is computed.
            views: view of each row, int64 ``[B]``, by its index among those of the cache.

        Returns:
            Column → float32 ``[B, *shape]`` on the training device.

        Raises:
            RepaError: an image cannot be read any more.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a method may choose its targets from.

    Attributes:
        columns: name → spec.
        grids: source → rows and columns of its tokens.
        notes: source → what its provenance notes.
    """

    columns: Mapping[str, ColumnSpec]
    grids: Mapping[str, tuple[int, int]]
    notes: Mapping[str, Mapping[str, Any]]


def offer(manifest: Manifest, live: LiveTargets | None = None) -> Offer:
    """Return the columns there are to train on.

    With live targets the cache's own targets are left out, even those of other teachers: a run is either
    online or cached, never half of each.

    Args:
        manifest: of the cache.
        live: computes targets; None reads them all.
    """
    grids = {source: provenance.grid for source, provenance in manifest.sources.items()}
    notes = {source: provenance.notes for source, provenance in manifest.sources.items()}
    if live is None:
        return Offer(columns=manifest.columns, grids=grids, notes=notes)
    kept = {name: spec for name, spec in manifest.columns.items() if not is_target(name)}
    return Offer(
        columns={**kept, **live.columns},
        grids={**grids, **live.grids},
        notes={**notes, **live.notes},
    )


def is_target(column: str) -> bool:
    """Tell whether a column holds a teacher's targets, or their scales."""
    return split_column(column)[1].removesuffix(SCALE_SUFFIX) in TARGET_KINDS


def read_columns(names: Iterable[str], live: LiveTargets | None) -> tuple[str, ...]:
    """Choose those of some columns that are read from the cache."""
    return tuple(name for name in names if live is None or name not in live.columns)


def live_columns(names: Iterable[str], live: LiveTargets | None) -> tuple[str, ...]:
    """Choose those of some columns that are computed."""
    return () if live is None else tuple(name for name in names if name in live.columns)


def with_targets(batch: Batch, live: LiveTargets, names: Sequence[str]) -> Batch:
    """Return a batch with live columns of its rows beside those it was read with.

    Args:
        batch: on the training device; only `Batch.rows` and `Batch.views` stay on the host.
        live: computes them.
        names: the columns that are wanted.
    """
    return replace(batch, columns={**batch.columns, **live(batch.rows.numpy(), names, batch.views.numpy())})
