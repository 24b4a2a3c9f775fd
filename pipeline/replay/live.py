"""Teachers called while training, on the images of a cache, for the online reference mode.

An image's features are the same bits as in a float32 cache written on the same machine if *one thread*
computes a batch, as in `lanes`, and each row stands where it stood then, see `placement`. Rows that stood at
the same position need batches of their own, padded with zeros: for B rows from batches of S, with B far below
S, most of the computing is for the exactness (of a cache written with ``--batch-size 1``, none is). A GPU
used for training therefore computes plain batches, unless exactness is asked for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import CacheError, RepaError
from ...data.format.columns import (
    AUTOENCODER,
    MOMENTS,
    ColumnSpec,
    attention_source,
    column_name,
    split_column,
)
from ...data.format.manifest import LOADED_NOTE
from ...data.format.opening import as_recorded, open_manifest
from ...data.machine import usable_cores
from ...data.reading.reader import CacheReader
from ..encoders import find_teacher, load_encoder
from ..encoders.precision import require_arithmetic
from ..encoders.registry import file_of
from ..images.views import check_views, in_view
from ..images.workers import decode_row
from ..lanes.threads import one_thread_lanes
from ..plan import default_batch_size
from .images import images_of
from .placement import Pass, Placement

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.format.manifest import Provenance
    from ...data.storage.bucket import CachePath
    from ..encoders.base import Encoder

    Decoded = NDArray[np.uint8] | str

MAX_DECODERS = 8
MAX_LANES = 16
_NO_WEIGHTS: Mapping[str, Path] = {}


class LiveTeachers:
    """Computes ``<teacher>/patch``, ``/q`` and ``/k`` of rows of a cache. It is the trainer's `LiveTargets`.

    Args:
        cache: the cache: which images, how cropped, and by what its columns were made.
        data: the images, a folder or ``demo``.
        encoders: names of the teachers.
        blocks: blocks whose queries and keys it offers, counted from 1, ascending, of every teacher that has
            them; none offers tokens only.
        weights: encoder → file of its weights.
        random_weights: draw the weights of teachers that the cache does not have; those that it has drawn
            are drawn again anyway.
        exact: give the bits of a float32 cache on a GPU too, see the module.
        typed: flags that the command line itself gave: modules that ``--data`` and ``--encoder`` name are
            imported only then.

    Raises:
        RepaError: unknown images or teachers, or a block that no teacher has.
        CacheError: these are not the images of the cache, or it has views that cannot be encoded here.
    """

    def __init__(
        self,
        cache: CachePath,
        *,
        data: str,
        encoders: Sequence[str],
        blocks: tuple[int, ...] = (),
        weights: Mapping[str, Path] = _NO_WEIGHTS,
        random_weights: bool = False,
        exact: bool = False,
        typed: Collection[str] = (),
    ) -> None:
        self._cache = cache
        self._manifest = open_manifest(cache)
        check_views(self._manifest.views, cache)
        self._images = images_of(self._manifest, data, cache, may_import="--data" in typed)
        found = {each: find_teacher(each, may_import="--encoder" in typed) for each in encoders}
        self._facts = {teacher.name: teacher for teacher in found.values()}
        own = {each: teacher.name for each, teacher in found.items()}
        files = {own[each]: file for each in encoders if (file := file_of(each)) is not None}
        self._weights = files | {own.get(each, each): file for each, file in weights.items()}
        self._random_weights = random_weights
        self._exact = exact
        self._teachers: list[_Teacher] = []
        self._decoders = ThreadPoolExecutor(min(MAX_DECODERS, usable_cores()), "repa-decode")
        self._ahead: dict[bytes, list[Future[Decoded]]] = {}
        self.columns: dict[str, ColumnSpec] = {}
        self.grids: dict[str, tuple[int, int]] = {}
        self.notes: dict[str, Mapping[str, Any]] = {}
        self.record: dict[str, Any] = {
            "data": data,
            "encoders": list(encoders),
            "weights": {name: str(path) for name, path in self._weights.items()},
            "random_weights": random_weights,
        }
        self._names = tuple(self._facts)
        self._blocks = {name: self._declare(name, blocks) for name in self._names}
        if blocks and not any(self._blocks.values()):
            depths = ", ".join(f"{name} 1 to {teacher.depth}" for name, teacher in self._facts.items())
            raise RepaError(
                f"the method wants attention of blocks {', '.join(map(str, blocks))}, there is {depths}",
                "choose with --set method.teacher_blocks=[…], or take another --encoder",
            )

    def _declare(self, name: str, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Say what a teacher computes. The table alone tells it, and nothing is loaded."""
        teacher = self._facts[name]
        if not {name, attention_source(name)} & self._manifest.sources.keys():
            teacher.require_resolution(self._manifest.resolution)
        grid = teacher.grid(self._manifest.resolution)
        tokens = grid[0] * grid[1]
        self.grids[name] = grid
        self.columns[column_name(name, "patch")] = ColumnSpec(shape=(tokens, teacher.width), dtype="float32")
        if not blocks or not teacher.heads or blocks[0] < 1 or blocks[-1] > teacher.depth:
            return ()
        source = attention_source(name)
        self.grids[source] = grid
        self.notes[source] = {
            "blocks": list(blocks),
            "depth": teacher.depth,
            "logit_scale": teacher.head_width**-0.5,
            "head_width": teacher.head_width,
            "rank": teacher.head_width,
            "form": "exact",
            "keys": "as computed",
            "calibration": None,
            "fidelity": None,
        }
        shape = (len(blocks), teacher.heads, tokens, teacher.head_width)
        for kind in ("q", "k"):
            self.columns[column_name(name, kind)] = ColumnSpec(shape=shape, dtype="float32")
        return blocks

    def load(self, device: torch.device) -> dict[str, Provenance]:
        """Load the teachers.

        Args:
            device: where they compute and their columns lie.

        Returns:
            Source → what computes it.

        Raises:
            RepaError: weights that are not there.
            CacheError: weights other than those that the cache was written with.
        """
        with CacheReader(self._cache, (MOMENTS,)) as reader:
            valid_rows = reader.valid_rows
        provenances: dict[str, Provenance] = {}
        for name in self._names:
            teacher = self._load(name, device, valid_rows)
            self._teachers.append(teacher)
            provenance = _as_run(teacher.encoder.provenance(teacher.batch_size))
            provenances[name] = provenance
            if self._blocks[name]:
                source = attention_source(name)
                provenances[source] = replace(provenance, notes=self.notes[source])
        return provenances

    def _load(self, name: str, device: torch.device, valid_rows: NDArray[np.int64]) -> _Teacher:
        sources = self._manifest.sources
        declared = [sources[source] for source in (name, attention_source(name)) if source in sources]
        # of a teacher that the cache does not have: as `repa preprocess` would add it
        batch_size = (declared or [sources[AUTOENCODER]])[0].batch_size
        batch_size = batch_size or default_batch_size(self._manifest.resolution)
        compute_dtype = declared[0].compute_dtype if declared else "float32"
        require_arithmetic(compute_dtype, device)
        encoder = load_encoder(
            self._facts[name],
            resolution=self._manifest.resolution,
            device=device,
            compute_dtype=compute_dtype,
            weights=self._weights.get(name),
            random_weights=self._random_weights or any(each.random_weights for each in declared),
        )
        found = as_recorded(encoder.provenance(batch_size), declared).weights_sha256
        for each in declared:
            if each.weights_sha256 != found:
                raise CacheError(
                    f"the live teacher {name} is not the one of cache {self._cache}: its weights have sha256 "
                    f"{found[:12]}…, the cache's {each.weights_sha256[:12]}…",
                    f"give the cache's with --weights {name}=FILE",
                )
        return _Teacher(
            encoder,
            batch_size=batch_size,
            blocks=self._blocks[name],
            placement=Placement(valid_rows, self._manifest.shard_rows, batch_size),
            device=device,
        )

    def prepare(self, rows: NDArray[np.int64]) -> None:
        """Begin to decode rows that will be asked for soon."""
        key = rows.tobytes()
        if key not in self._ahead:
            self._ahead[key] = self._decode(rows)

    def __call__(
        self, rows: NDArray[np.int64], names: Sequence[str], views: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        """Compute columns of some rows, see `LiveTargets`.

        Args:
            rows: valid rows, int64 ``[B]``.
            names: which of `columns`.
            views: view of each row, int64 ``[B]``.

        Returns:
            Column → float32 ``[B, *shape]`` on the device.

        Raises:
            RepaError: an image cannot be read any more, or not be decoded.
        """
        futures = self._ahead.pop(rows.tobytes(), None) or self._decode(rows)
        seen = [self._manifest.views[view] for view in views]
        images = [
            in_view(torch.from_numpy(self._pixels(int(row), future)), view)
            for row, future, view in zip(rows, futures, seen, strict=True)
        ]
        targets: dict[str, Tensor] = {}
        for teacher in self._teachers:
            kinds = {
                split_column(name)[1]: name for name in names if split_column(name)[0] == teacher.encoder.name
            }
            if kinds:
                features = teacher.compute(rows, images, tuple(kinds), exact=self._exact)
                targets |= {kinds[kind]: values for kind, values in features.items()}
        return targets

    def close(self) -> None:
        """End the threads, waiting for what they have begun."""
        self._ahead.clear()
        self._decoders.shutdown(cancel_futures=True)
        for teacher in self._teachers:
            teacher.close()

    def _decode(self, rows: NDArray[np.int64]) -> list[Future[Decoded]]:
        return [
            self._decoders.submit(decode_row, self._images, int(row), self._manifest.resolution)
            for row in rows
        ]

    def _pixels(self, row: int, decoded: Future[Decoded]) -> NDArray[np.uint8]:
        pixels = decoded.result()
        if isinstance(pixels, str):
            raise CacheError(
                f"image {self._images.keys[row]} of {self._images.name}, row {row} of cache {self._cache}, "
                f"cannot be decoded any more ({pixels})",
                "restore the image",
            )
        return pixels


class _Teacher:
    """A loaded teacher and the threads that it computes in."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        batch_size: int,
        blocks: tuple[int, ...],
        placement: Placement,
        device: torch.device,
    ) -> None:
        self.encoder = encoder
        self.batch_size = batch_size
        self._blocks = blocks
        self._placement = placement
        self._device = device
        self._lanes = one_thread_lanes(min(MAX_LANES, usable_cores())) if device.type == "cpu" else None

    def compute(
        self,
        rows: NDArray[np.int64],
        images: Sequence[Tensor],
        kinds: Sequence[str],
        *,
        exact: bool,
    ) -> dict[str, Tensor]:
        """Compute features float32 ``[B, …]`` of some kinds, of images uint8 ``[3, R, R]`` of rows."""
        passes = list(self._placement.passes(rows, exact=exact or self._lanes is not None))
        run = map if self._lanes is None else self._lanes.map
        outputs = run(lambda each: self._encode(each, images, kinds), passes)
        features: dict[str, Tensor] = {}
        for each, output in zip(passes, outputs, strict=True):
            wanted, positions = torch.from_numpy(each.rows), torch.from_numpy(each.positions)
            for kind, values in output.items():
                if kind not in features:
                    # copied into a plain tensor: autograd refuses to save one that was made in inference mode
                    features[kind] = torch.empty(
                        (len(rows), *values.shape[1:]), dtype=torch.float32, device=self._device
                    )
                features[kind][wanted.to(self._device)] = values[positions.to(self._device)]
        return features

    def close(self) -> None:
        if self._lanes is not None:
            self._lanes.shutdown(cancel_futures=True)

    def _encode(self, one: Pass, images: Sequence[Tensor], kinds: Sequence[str]) -> dict[str, Tensor]:
        pixels = torch.zeros((one.size, *images[0].shape), dtype=torch.uint8)
        for row, position in zip(one.rows, one.positions, strict=True):
            pixels[position] = images[row]
        blocks = self._blocks if {"q", "k"} & set(kinds) else ()
        output = self.encoder.encode(pixels.to(self._device), attention=blocks)
        return {kind: output[kind] for kind in kinds}


def _as_run(provenance: Provenance) -> Provenance:
    """Return a provenance that tells weights by what is run, as runs have always recorded live teachers."""
    return replace(provenance, weights_sha256=provenance.notes.get(LOADED_NOTE, provenance.weights_sha256))
