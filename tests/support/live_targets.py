"""Live targets that a test can foretell, as they are what a synthetic cache stores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from repa.data.format.columns import source_of
from repa.data.format.opening import open_manifest
from repa.data.testing import expected_row
from repa.trainer.input.online import is_target

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from repa.data.format.manifest import Provenance
    from torch import Tensor


class Teacher:
    """Knows what a synthetic cache stores of its targets, and gives it in float32."""

    def __init__(self, cache: Path) -> None:
        manifest = open_manifest(cache)
        self._stored = {name: spec for name, spec in manifest.columns.items() if is_target(name)}
        self.columns = {name: replace(spec, dtype="float32") for name, spec in self._stored.items()}
        self.sources: dict[str, Provenance] = {
            source_of(name): manifest.sources[source_of(name)] for name in self.columns
        }
        self.grids = {source: each.grid for source, each in self.sources.items()}
        self.notes = {source: each.notes for source, each in self.sources.items()}
        self.record = {"data": "nowhere"}
        self.loaded: list[torch.device] = []
        self.prepared: list[list[int]] = []
        self.asked: list[list[int]] = []
        self.names: set[tuple[str, ...]] = set()

    def load(self, device: torch.device) -> dict[str, Provenance]:
        self.loaded.append(device)
        return self.sources

    def prepare(self, rows: NDArray[np.int64]) -> None:
        self.prepared.append(rows.tolist())

    def __call__(
        self, rows: NDArray[np.int64], names: Sequence[str], views: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        self.asked.append(rows.tolist())
        self.names.add(tuple(names))
        values = {
            name: np.stack(
                [
                    expected_row(name, int(row), self._stored[name], view=int(view))
                    for row, view in zip(rows, views, strict=True)
                ]
            )
            for name in names
        }
        return {name: torch.from_numpy(each.astype(np.float32)) for name, each in values.items()}
