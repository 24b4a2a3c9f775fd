"""What stands for the targets of the cache in a measured step, constant ones or a teacher called live."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...data.format.columns import attention_source, source_of, split_column
from ...trainer.input.online import is_target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.format.manifest import Manifest, Provenance
    from ...pipeline.encoders.base import Encoder
    from .measured import BenchSettings


class StandIn:
    """What the two stand-ins for `LiveTargets` have in common, which is the targets of the cache by name."""

    def __init__(self, manifest: Manifest) -> None:
        self.columns = {name: spec for name, spec in manifest.columns.items() if is_target(name)}
        self.sources = {source_of(name): manifest.sources[source_of(name)] for name in self.columns}
        self.grids = {source: each.grid for source, each in self.sources.items()}
        self.notes = {source: each.notes for source, each in self.sources.items()}
        self.record: Mapping[str, Any] = {}
        self.device = torch.device("cpu")

    def load(self, device: torch.device) -> Mapping[str, Provenance]:
        """Take the device, and return what the cache says of its sources."""
        self.device = device
        return self.sources

    def prepare(self, rows: NDArray[np.int64]) -> None:
        """Do nothing, as there is nothing to decode."""


class ConstantTargets(StandIn):
    """The same targets for every batch, on the device, in the dtype that the cache stores."""

    def __init__(self, manifest: Manifest, batch_size: int) -> None:
        super().__init__(manifest)
        generator = torch.Generator().manual_seed(0)
        self._values = {
            name: torch.randn((batch_size, *spec.shape), generator=generator).to(torch.float16)
            for name, spec in self.columns.items()
        }

    def __call__(
        self, rows: NDArray[np.int64], names: Sequence[str], views: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        """Return the constant values by name, ``[B, …]`` in the stored dtype."""
        del rows, views
        self._values |= {name: self._values[name].to(self.device) for name in names}
        return {name: self._values[name] for name in names}


class LiveTeacher(StandIn):
    """The teacher on the same images in every batch. They are on the device already."""

    def __init__(self, manifest: Manifest, settings: BenchSettings, teacher: Encoder) -> None:
        super().__init__(manifest)
        self.columns = {name: replace(spec, dtype="float32") for name, spec in self.columns.items()}
        side = settings.side
        generator = torch.Generator().manual_seed(0)
        shape = (settings.batch_size, 3, side, side)
        self._images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self._teacher = teacher

    def __call__(
        self, rows: NDArray[np.int64], names: Sequence[str], views: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        """Return what the teacher makes of its images, by name, ``[B, …]`` float32."""
        del rows, views
        self._images = self._images.to(self.device)
        kinds = {split_column(name)[1]: name for name in names}
        noted = self.notes.get(attention_source(self._teacher.name), {})
        blocks = tuple(noted["blocks"]) if "q" in kinds else ()
        features = self._teacher.encode(self._images, attention=blocks)
        # clones are not of inference mode, beside whose tensors no gradient may be computed
        return {name: features[kind].clone() for kind, name in kinds.items()}
