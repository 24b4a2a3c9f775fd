"""A cache in the hands of others, as rows in NumPy and batches in PyTorch; `repa.open` returns it.

PyTorch is imported where tensors are made and not before.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .attention import Attention, attention_of
from .data.errors import CacheError, RepaError
from .data.format.captions import captions_path, has_captions, read_captions, read_table, with_captions
from .data.format.columns import (
    LABEL,
    MOMENTS,
    scale_column,
    source_of,
)
from .data.format.foreign import foreign_lines
from .data.format.opening import open_manifest, read_keys
from .data.format.survey import survey
from .data.reading.order import split_holdout
from .data.reading.reader import CacheReader
from .data.storage.bucket import cache_path
from .data.tars.names import names_tars

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from .data.format.columns import ColumnSpec
    from .data.format.manifest import Manifest
    from .data.reading.batches import BatchLoader
    from .data.reading.latents import LatentScale


class OpenedCaptions:
    """The captions of a cache's images, and what text encoders made of them.

    Row 0 is the empty caption, which stands for no condition.

    Args:
        cache: folder or address of the cache of the images.

    Raises:
        CacheError: it has no captions, or they are damaged.
    """

    def __init__(self, cache: str | os.PathLike[str]) -> None:
        self.path = cache_path(os.fspath(cache))
        if not has_captions(self.path):
            raise CacheError(
                f"cache {self.path} has no captions",
                f"add them with `repa preprocess --cache {self.path} --captions FILE --text-encoder NAME`",
                field="captions",
            )
        self.cache = OpenedCache(str(captions_path(self.path)))

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenedCaptions, (str(self.path),)

    def __len__(self) -> int:
        """Count the distinct captions, the empty one among them."""
        return len(self.cache)

    @cached_property
    def texts(self) -> list[str]:
        """The captions by row."""
        return read_captions(self.path)

    @cached_property
    def of_image(self) -> NDArray[np.int32]:
        """Rows of the captions of each image, int32 ``[N, P]``, −1 where an image has fewer than P."""
        return read_table(self.path, open_manifest(self.path), self.cache.manifest)

    def of(self, image: int) -> list[str]:
        """Return the captions of an image, the empty one where it has none.

        Args:
            image: its row.

        Raises:
            IndexError: there is no such row.
        """
        return [self.texts[row] for row in self.of_image[image].tolist() if row >= 0]

    def read(self, rows: Iterable[int] | NDArray[np.int64], *columns: str) -> dict[str, NDArray[Any]]:
        """Read columns of captions by their rows, see `OpenedCache.read`."""
        return self.cache.read(rows, *columns)


class OpenedCache:
    """Rows by their index, and what the cache says of itself.

    It reads nothing but the manifest until something is asked for. It is safe to share between threads, to
    fork with and to pickle.

    Args:
        cache: its folder, or its address in a bucket.

    Attributes:
        path: where it lies.
        manifest: which images and models its columns are of, see `Manifest`.

    Raises:
        CacheError: there is none, or its manifest is damaged.
        RepaError: it is an export in tars, or the operating system refuses.
    """

    def __init__(self, cache: str | os.PathLike[str]) -> None:
        name = os.fspath(cache)
        if names_tars(name):
            raise RepaError(
                f"{name} is a cache in tars, which has no rows by index",
                f"bring it into a folder with `repa cache import {name} --cache …`",
                field="cache",
            )
        self.path = cache_path(name)
        self.manifest: Manifest = open_manifest(self.path)
        self._scales: dict[str, LatentScale] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenedCache, (str(self.path),)

    def __repr__(self) -> str:
        columns = (f"  {name}: {spec.dtype} {list(spec.shape)}" for name, spec in self.columns.items())
        rows = f"{len(self):,} rows, {len(self.valid_rows):,} with data"
        foreign = (f"  {line}" for line in foreign_lines(self.manifest))
        return "\n".join((f"cache {self.path}: {rows}", *columns, *foreign))

    def __len__(self) -> int:
        """Count the rows, those without data included."""
        return self.manifest.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Read a row, counted from the end where it is negative.

        Returns:
            Column → array ``[*shape]`` as stored, and ``label``.

        Raises:
            IndexError: there is no such row.
            CacheError: it has no data, see `valid_rows`, or the bytes are damaged.
        """
        index = row + len(self) if row < 0 else row
        if not 0 <= index < len(self):
            raise IndexError(f"row {row} is not one of the {len(self):,} of {self.path}")
        values = self.read([index], *self.columns)
        return {name: value[0] for name, value in values.items()} | {LABEL: int(self.labels[index])}

    @cached_property
    def columns(self) -> dict[str, ColumnSpec]:
        """Name → shape and dtype of a row, of every column that is wholly written."""
        absent = survey(self.path, self.manifest).absent
        return {name: spec for name, spec in self.manifest.columns.items() if not absent[source_of(name)]}

    @cached_property
    def captions(self) -> OpenedCaptions:
        """The captions of the images.

        Raises:
            CacheError: there are none, or they are damaged.
        """
        return OpenedCaptions(str(self.path))

    @cached_property
    def keys(self) -> list[str]:
        """Name of the image of every row."""
        return read_keys(self.path, self.manifest)

    @property
    def labels(self) -> NDArray[np.int32]:
        """Class of every row, int32 ``[N]``."""
        return self._reader.labels

    @property
    def valid_rows(self) -> NDArray[np.int64]:
        """Rows that have data, int64, ascending. The images of the others could not be decoded."""
        return self._reader.valid_rows

    def read(
        self, rows: Iterable[int] | NDArray[np.int64], *columns: str, view: str | None = None
    ) -> dict[str, NDArray[Any]]:
        """Read rows as they are stored, in the order asked for.

        Args:
            rows: their indices, B of them.
            columns: names of columns; ``label`` is one too. Those of captions are of an image's first one.
            view: its name, for a cache with several views of an image; the first by default.

        Returns:
            Column → array ``[B, *shape]`` of the stored dtype.

        Raises:
            CacheError: a column or view is not there, a row has no data, or the bytes are damaged.
        """
        index = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows), dtype=np.int64)
        names = [name for name in dict.fromkeys(columns) if name != LABEL]
        reader = self._reader if set(names) <= self.columns.keys() else CacheReader(self.path, names)
        specs = self._declared
        out = {name: np.empty((len(index), *specs[name].shape), specs[name].numpy_dtype) for name in names}
        reader.read_rows(index, names, out, views=np.full_like(index, self._view(view)))
        return {name: self.labels[index] if name == LABEL else out[name] for name in dict.fromkeys(columns)}

    def loader(
        self,
        *columns: str,
        batch_size: int,
        seed: int = 0,
        view: str | None = None,
        start_step: int = 0,
        steps: int | None = None,
        holdout: int = 0,
        rank: int | None = None,
        world: int | None = None,
        accumulate: int = 1,
        order: str = "full",
        threads: int | None = None,
        pin_memory: bool = False,
    ) -> BatchLoader:
        """Return the batches that `repa train` would have, from any step on.

        The columns are no part of the order: where a method needs others from a step on, make another loader
        that starts there.

        Args:
            columns: to read; the scales of an int8 column come along.
            batch_size: images of a step, of all ranks and micro-batches together.
            seed: of the order and the views.
            view: name of the view to read of every image; by default one is drawn for each.
            start_step: steps that are done already.
            steps: how many steps there are in all; None goes on without end.
            holdout: rows that are left out, evenly spaced, as with the setting ``holdout`` of `repa train`.
            rank: which process this is; by default that of ``torch.distributed``, or 0 without.
            world: how many processes there are; by default as for `rank`.
            accumulate: micro-batches of a step, which are handed out one by one.
            order: ``full``; or ``blocks``, a few shards at a time, for slow disks.
            threads: threads that read; by default two, or one where the processes that torchrun or SLURM
                started on this machine have a core or less each.
            pin_memory: read into page-locked memory, if there is CUDA.

        Raises:
            CacheError: a column or view is not there, or a column not wholly written.
            RepaError: the batch does not divide among ranks and micro-batches, or is larger than the set.
        """
        from .data.machine import reading_threads
        from .data.reading.batches import BatchLoader, process_of
        from .data.reading.loader import CacheLoader

        if start_step < 0:
            raise RepaError(f"start_step={start_step} is not valid", "steps count from 0", field="start_step")
        names = self._with_companions(columns)
        reader = CacheReader(self.path, names)
        rank, world = process_of(rank, world)
        return BatchLoader(
            CacheLoader(
                reader,
                rows=split_holdout(reader.valid_rows, holdout)[0],
                batch_size=batch_size,
                rank=rank,
                world=world,
                accumulate=accumulate,
                seed=seed,
                view=None if view is None else self._view(view),
                order=order,
                images_seen=start_step * batch_size,
                last_image=None if steps is None else steps * batch_size,
                columns_at=lambda step: names,
                threads=reading_threads(threads),
                pin_memory=pin_memory,
            )
        )

    def latent_scale(self, norm: str = "autoencoder") -> LatentScale:
        """Return the map from the autoencoder's latents to those a backbone trains on.

        Args:
            norm: as of the setting ``latent_norm`` of `repa train`.

        Raises:
            CacheError: the cache has no autoencoder, or does not say what is asked for.
            RepaError: there is no such normalisation.
        """
        from .data.reading.latents import LATENT_NORMS, chosen_scale

        if norm not in LATENT_NORMS:
            raise RepaError(f"norm={norm} is not valid", f"there are {', '.join(LATENT_NORMS)}", field="norm")
        if norm not in self._scales:
            self._scales[norm] = chosen_scale(self.manifest, norm, where=str(self.path))
        return self._scales[norm]

    def latent(
        self,
        batch: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
        *,
        norm: str = "autoencoder",
    ) -> Tensor:
        """Draw from the posterior of each image and scale it, which is what a backbone trains on.

        Args:
            batch: of a loader with the column ``sd-vae/moments``, on any device.
            generator: to draw from, on the device of the batch; PyTorch's own by default.
            norm: as of `latent_scale`.

        Returns:
            float32 ``[B, C, h, w]``.
        """
        import torch

        from .data.reading.latents import sample_posterior, scale_latent

        moments = batch[MOMENTS].float()
        shape = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
        noise = torch.randn(shape, generator=generator, device=moments.device)
        return scale_latent(sample_posterior(moments, noise), *self.latent_scale(norm))

    def target(self, batch: Mapping[str, Tensor], column: str) -> Tensor:
        """Return a column of a batch in floating point, decoded where the batch lies.

        Args:
            batch: of a loader with that column, on any device.
            column: for example ``dinov2-b/patch``.

        Returns:
            ``[B, *shape]``, float32 if it is stored as int8, else the stored dtype.
        """
        from .trainer.methods.alignment import target

        return target(batch, column, self._declared)

    def attention(self, batch: Mapping[str, Tensor], teacher: str, *, block: int) -> Attention:
        """Return queries and keys of a teacher's block in floating point, decoded where the batch lies.

        Args:
            batch: of a loader with the teacher's ``q`` and ``k``, on any device.
            teacher: for example ``dinov2-b``.
            block: one of the blocks whose attention is stored, counted from 1.

        Raises:
            CacheError: the cache has no attention of that block.
        """
        return attention_of(self.path, self.manifest, batch, teacher, block)

    @cached_property
    def _declared(self) -> Mapping[str, ColumnSpec]:
        """Name → spec of every column that has been declared, of the captions too."""
        return with_captions(self.path, self.manifest).columns

    @cached_property
    def _reader(self) -> CacheReader:
        # single rows at random: reading past the page cache would gain nothing
        return CacheReader(self.path, tuple(self.columns), direct="off")

    def _view(self, name: str | None) -> int:
        views = self.manifest.views
        if name is None:
            return 0
        if name not in views:
            raise CacheError(
                f"cache {self.path} has no view {name}", f"its views are {', '.join(views)}", field="view"
            )
        return views.index(name)

    def _with_companions(self, columns: Iterable[str]) -> tuple[str, ...]:
        """Name the columns and the scales that belong to them, each once."""
        declared = self._declared
        names = [each for name in columns for each in (name, scale_column(name)) if each in (name, *declared)]
        return tuple(dict.fromkeys(name for name in names if name != LABEL))
