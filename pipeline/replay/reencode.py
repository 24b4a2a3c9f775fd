"""Random rows of a cache encoded once more, each column held against what it was rounded from.

A row is computed in a batch of the size and at the position that it had when the cache was written
(`placement`), so on the CPU that wrote it every bit is the same. Elsewhere the float32 numbers x of now
differ from those of then by the noise of another device or library; a stored value s must then lie within its
rounding of x, and that noise: |s − x| ≤ rounding(s) + noise · max|x|, the maximum taken over the row. The
rounding is nothing for float32, half the distance of neighbouring numbers for float16, half a scale for int8.

Factors of attention are not rounded from numbers that another device would find again: an image's own basis
is free to turn. They are held against what they stand for: in each head they must lose no more of the
teacher's attention than twice what factors computed now lose, and the noise.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import CacheError
from ...data.format.columns import (
    ATTENTION_KINDS,
    AUTOENCODER,
    SCALE_SUFFIX,
    column_name,
    model_of,
    scale_column,
)
from ...data.format.foreign import foreign_note
from ...data.format.opening import open_manifest
from ...data.reading.all_views import read_all_views
from ...data.reading.reader import CacheReader
from ..columns.factored import restore_attention
from ..columns.measures import attention_divergence
from ..columns.specs import FACTORED
from ..images.views import in_each_view
from ..images.workers import decode_row
from ..lanes.batches import Batch
from ..lanes.lanes import Task, open_lanes
from .placement import Pass, Placement
from .recorded import recorded_config, recorded_images, recorded_job, recorded_model
from .tolerances import tolerance_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ...data.format.columns import ColumnSpec
    from ...data.format.manifest import Manifest
    from ..columns.models import SourceModel
    from ..images.base import ImageSource
    from ..shard_loop.worker import Job
    from .recorded import Given

FACTOR_MARGIN = 2.0
"""How many times what factors computed now lose of a head's attention may be lost by what is stored."""

_ARITHMETIC = 1e-6  # of computing the bound itself, relative to the value
EXACT = ":exact"
"""What a column was rounded from goes beside it, under its name with this suffix."""


@dataclass(kw_only=True)
class Reencoded:
    """One column, but for scales, which are judged with what they scale.

    Attributes:
        column: its name.
        rows: rows compared, each in all views.
        identical: those whose stored bytes, scales included, are what was computed now in all views.
        largest: the largest |s − x| in units of what is allowed; not above 1 is kept.
        worst: the row it is in.
        noise: see `Tolerance`.
        outside: rows with a value beyond what is allowed.
    """

    column: str
    noise: float
    rows: int = 0
    identical: int = 0
    largest: float = 0.0
    worst: int | None = None
    outside: list[int] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether every row is within what is allowed."""
        return not self.outside

    def add(self, row: int, same: bool, excess: float) -> None:
        """Count a row.

        Args:
            row: index of the image.
            same: whether its bytes are the same.
            excess: its largest |s − x| in units of what is allowed, of all views; NaN is beyond.
        """
        self.rows += 1
        self.identical += same
        if not excess <= self.largest:
            self.largest, self.worst = excess, row
        if not excess <= 1:
            self.outside.append(row)


def reencode(cache: Path, given: Given, *, rows: int, seed: int = 0) -> list[Reencoded]:
    """Encode random valid rows of every source again and compare.

    Args:
        cache: folder of the cache.
        given: where images and weights lie.
        rows: how many; all, if there are fewer.
        seed: of the choice.

    Returns:
        One comparison a column; of imported latents none, as nothing here encodes them.

    Raises:
        RepaError: images or weights that cannot be had, a row that is corrupt.
        CacheError: a source that is not complete; other images, weights or forms than the recorded ones.
    """
    manifest = open_manifest(cache)
    images = recorded_images(cache, manifest, given)
    found: list[Reencoded] = []
    for source in manifest.sources:
        if source == AUTOENCODER and foreign_note(manifest) is not None:
            continue
        columns = tuple(manifest.source_columns(source))
        with CacheReader(cache, columns) as reader:
            drawn = np.random.Generator(np.random.Philox(key=seed)).permutation(reader.valid_rows)[:rows]
            job = recorded_job(recorded_config(cache, manifest, source, given), manifest, images)
            model = recorded_model(job, manifest, source, images)
            check = _SourceCheck(manifest, source, reader)
            for part, computed in _compute(model, job, source, reader.valid_rows, np.sort(drawn), images):
                check.compare(part, computed)
            found += check.columns.values()
    return found


def _compute(
    model: SourceModel,
    job: Job,
    source: str,
    valid: NDArray[np.int64],
    rows: NDArray[np.int64],
    images: ImageSource,
) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]]:
    """Compute columns ``[n, V, …]`` of some rows, and what they were rounded from, pass by pass."""
    assert job.config.batch_size is not None, "recorded"
    placement = Placement(valid, job.manifest.shard_rows, job.config.batch_size)
    compute = in_each_view(partial(_encode, model, source), job.manifest.views)
    task = Task(model=model.name, sources=(source,), compute=compute)
    waiting: deque[tuple[Pass, Any]] = deque()
    with open_lanes(job.device, job.threads) as lanes:

        def oldest() -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
            one, pending = waiting.popleft()
            columns = pending.result().batch.columns
            return rows[one.rows], {name: values[one.positions] for name, values in columns.items()}

        for one in placement.passes(rows, exact=True):
            waiting.append((one, lanes.submit(_batch(one, rows, images, job), [task])))
            if len(waiting) == lanes.ahead:
                yield oldest()
        while waiting:
            yield oldest()


def _encode(model: SourceModel, source: str, images: torch.Tensor) -> dict[str, torch.Tensor]:
    columns, exact = model.encode_exactly(images, (source,))
    return {**columns, **{f"{name}{EXACT}": values.float() for name, values in exact.items()}}


def _batch(one: Pass, rows: NDArray[np.int64], images: ImageSource, job: Job) -> Batch:
    side = job.config.resolution
    pixels = [np.zeros((3, side, side), np.uint8) for _ in range(one.size)]
    for row, position in zip(rows[one.rows].tolist(), one.positions.tolist(), strict=True):
        decoded = decode_row(images, row, side)
        if isinstance(decoded, str):
            raise CacheError(
                f"image {images.keys[row]} of {images.name}, row {row} of cache {job.config.cache}, cannot "
                f"be decoded any more ({decoded})",
                "restore the image",
            )
        pixels[position] = decoded
    return Batch(shard=0, rows=list(range(one.size)), images=pixels)


class _SourceCheck:
    """The comparisons of one source."""

    def __init__(self, manifest: Manifest, source: str, reader: CacheReader) -> None:
        self._reader = reader
        self._model = model_of(source)
        self._provenance = manifest.sources[source]
        self._specs: Mapping[str, ColumnSpec] = manifest.source_columns(source)
        self._tolerance = tolerance_of(self._provenance)
        self.columns = {
            name: Reencoded(column=name, noise=self._tolerance.noise)
            for name in self._specs
            if not name.endswith(SCALE_SUFFIX)
        }

    def compare(self, rows: NDArray[np.int64], computed: Mapping[str, NDArray[Any]]) -> None:
        stored = read_all_views(self._reader, rows, tuple(self._specs))
        factored = self._provenance.notes.get("form") == FACTORED
        together = self._factor_excess(stored, computed) if factored else None
        for name, result in self.columns.items():
            for position, row in enumerate(rows.tolist()):
                same = all(
                    stored[each][position].tobytes() == computed[each][position].tobytes()
                    for each in (name, scale_column(name))
                    if each in stored
                )
                if together is not None:
                    result.add(row, same, float(together[position]))
                    continue
                scales = stored.get(scale_column(name))
                exact = computed[f"{name}{EXACT}"].astype(np.float64)
                excesses = [
                    excess_of(values, None if scales is None else scales[at], exact[at], result.noise)
                    for view, values in enumerate(stored[name][position])
                    for at in [(position, view)]
                ]
                result.add(row, same, float(np.max(excesses)))

    def _factor_excess(
        self, stored: Mapping[str, NDArray[Any]], computed: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float64]:
        """Compute how much more than allowed the worst head of each row loses, queries and keys together."""
        notes = self._provenance.notes
        names = [column_name(self._model, kind) for kind in ATTENTION_KINDS]
        exact = [torch.from_numpy(computed[f"{name}{EXACT}"]).flatten(0, 1) for name in names]
        losses = []
        for columns in (stored, computed):
            tensors = {name: torch.from_numpy(columns[name]).flatten(0, 1) for name in self._specs}
            kept = restore_attention(self._model, notes, tensors)
            divergence = attention_divergence((exact[0], exact[1]), kept, float(notes["logit_scale"]))
            losses.append(divergence.mean(-1).numpy())
        allowed = FACTOR_MARGIN * losses[1] + self._tolerance.divergence
        heads: NDArray[np.float64] = (losses[0] / allowed).max(axis=(1, 2))
        worst: NDArray[np.float64] = heads.reshape(-1, len(self._reader.manifest.views)).max(axis=1)
        return worst


def excess_of(
    stored: NDArray[Any], scale: NDArray[Any] | None, exact: NDArray[np.float64], noise: float
) -> float:
    """Compute the largest |s − x| of a row and view in units of what is allowed, 0 where nothing differs.

    Args:
        stored: as stored ``[*shape]``.
        scale: of an int8 column.
        exact: what is computed now, ``[*shape]``.
        noise: see `Tolerance`.
    """
    if scale is not None:
        steps = scale.astype(np.float64)[..., None, :]
        values, rounding = stored * steps, np.broadcast_to(steps / 2, exact.shape)
    else:
        values = stored.astype(np.float64)
        half = np.spacing(np.abs(stored)).astype(np.float64) / 2
        rounding = half if stored.dtype == np.float16 else np.zeros_like(exact)
    off = np.abs(values - exact)
    allowed = rounding + _ARITHMETIC * np.abs(exact) * (rounding > 0) + noise * np.abs(exact).max(initial=0)
    ratio = np.divide(off, allowed, out=np.where(off > 0, np.inf, 0.0), where=allowed > 0)
    return float(ratio.max(initial=0))
