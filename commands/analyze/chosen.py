"""Which images and teachers of a cache are looked at, and their columns in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ...data.errors import RepaError
from ...data.format.columns import LABEL, column_name
from ...trainer.methods.alignment import stored_columns, teachers_with

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.format.manifest import Manifest
    from ...data.reading.reader import CacheReader


class Columns(NamedTuple):
    """A batch of rows as tensors.

    Attributes:
        first: number of its first row among those chosen.
        values: column → values as stored ``[B, …]``, and ``label`` int64 ``[B]``.
    """

    first: int
    values: dict[str, Tensor]


def chosen_rows(reader: CacheReader, num: int, seed: int) -> NDArray[np.int64]:
    """Draw rows of a cache without replacement, all of them where there are fewer.

    Raises:
        RepaError: fewer than 8 images are valid.
    """
    valid = reader.valid_rows
    if len(valid) < 8:
        raise RepaError(
            f"cache {reader.path} has {len(valid)} valid images, and an analysis needs 8",
            "encode more images",
            field="--cache",
        )
    picked = np.random.default_rng(seed).choice(len(valid), min(num, len(valid)), replace=False)
    return np.sort(valid[picked])


def chosen_teachers(manifest: Manifest, asked: Sequence[str], *kinds: str, where: str) -> tuple[str, ...]:
    """Return the teachers to look at, those that are asked for or all that have the columns.

    Raises:
        RepaError: one that is asked for has none of them.
    """
    present = teachers_with(manifest.columns, *kinds)
    for name in asked:
        if name not in present:
            raise RepaError(
                f"cache {where} has no {', '.join(f'{name}/{kind}' for kind in kinds)}",
                f"there are {', '.join(present)}" if present else "add a teacher with `repa preprocess`",
                field="--teacher",
            )
    return tuple(dict.fromkeys(asked)) or present


def columns_of(manifest: Manifest, teachers: Sequence[str], *kinds: str) -> tuple[str, ...]:
    """Name what must be read to know these columns of the teachers, scales included."""
    names = (column_name(teacher, kind) for teacher in teachers for kind in kinds)
    return tuple(dict.fromkeys(each for name in names for each in stored_columns(name, manifest.columns)))


def batches(
    reader: CacheReader, rows: NDArray[np.int64], columns: Sequence[str], size: int
) -> Iterator[Columns]:
    """Yield rows of a cache in batches, the first view of each image.

    Raises:
        CacheError: a row is damaged.
    """
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        specs = reader.manifest.columns
        out = {name: np.empty((len(part), *specs[name].shape), specs[name].numpy_dtype) for name in columns}
        reader.read_rows(part, tuple(out), out)
        values = {name: torch.from_numpy(array) for name, array in out.items()}
        values[LABEL] = torch.from_numpy(reader.labels[part].astype(np.int64))
        yield Columns(first, values)
