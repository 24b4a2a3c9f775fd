"""Banks, the vectors of images that samples are conditioned on (GMem, arXiv 2412.08781).

A bank is a column of class tokens of a cache, as it lies there or copied into a file of its own, whole or
factored. All have one row for each valid row of the cache, in the cache's order; which rows of the cache
they are, `position_of` knows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le, Len

from ...data.edge import shortened
from ...data.errors import RepaError
from ...data.format.canonical import canonical_sha256
from ...data.format.columns import source_of, split_column
from ...data.format.manifest import Provenance  # noqa: TC001 - annotations are read when files are parsed
from ...data.reading.reader import CacheReader
from ..models.conditioning import CLS
from .bank_factors import FactoredSaid  # noqa: TC001 - annotations are read when files are parsed

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.storage.bucket import CachePath
    from .bank_factors import Basis

FLAG = "--bank"
VERSION = 1
_MOST = 10**12


@dataclass(frozen=True, kw_only=True)
class BankSaid:
    """What a bank is of.

    Attributes:
        version: of the form of a file.
        column: name of the column, ``<teacher>/cls``.
        count: number of rows.
        cache: identity of the cache.
        source: identity of the column's source there.
        view: name of the view.
        resolution: side in pixels of the cropped images.
        crop: name of the crop.
        exif_orientation: ``ignored`` or ``applied``.
        teacher: what computed the vectors.
        factored: how far they are from those of the cache; None where they are the same.
        rounded: whether they are those of the cache rounded to float16; no file of earlier versions says it.
    """

    version: int
    column: Annotated[str, Len(1, 200)]
    count: Annotated[int, Ge(1), Le(_MOST)]
    cache: Annotated[str, Len(1, 200)]
    source: Annotated[str, Len(1, 200)]
    view: Annotated[str, Len(1, 200)]
    resolution: Annotated[int, Ge(1), Le(1 << 16)]
    crop: Annotated[str, Len(1, 200)]
    exif_orientation: Annotated[str, Len(1, 200)]
    teacher: Provenance
    factored: FactoredSaid | None = None
    rounded: bool = False

    def document(self) -> dict[str, Any]:
        """Return what a file says of itself, in the words of the versions before `rounded` where they do."""
        said = asdict(self)
        if not self.rounded:
            del said["rounded"]
        return said

    @property
    def digest(self) -> str:
        """The hex sha256 of all that is said, the same for a cache and for a copy of the same numbers."""
        return canonical_sha256({**self.document(), "teacher": self.teacher.identity()})


class StoredBank(ABC):
    """Base of the banks.

    Args:
        said: what it is of.
        rows: the cache's row of each, int64 ``[N]``, ascending.

    Attributes:
        said: what it is of.
        rows: the cache's row of each.
        name: of its file or cache, for messages.
    """

    def __init__(self, said: BankSaid, rows: NDArray[np.int64], name: str) -> None:
        self.said = said
        self.rows = rows
        self.name = name

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels D of a vector."""

    def vectors(self, rows: Tensor) -> Tensor:
        """Return the vectors float32 ``[n, D]`` of rows of the bank, int64 ``[n]``.

        Raises:
            RepaError: they cannot be read.
        """
        found = self._vectors(rows.numpy().astype(np.int64))
        return torch.from_numpy(found.astype(np.float32))

    @abstractmethod
    def _vectors(self, rows: NDArray[np.int64]) -> NDArray[Any]: ...

    def position_of(self, row: int) -> int:
        """Return which row of the bank a row of the cache is.

        Raises:
            RepaError: the cache has no such row, or its image could not be decoded.
        """
        position = int(np.searchsorted(self.rows, row))
        if position == len(self.rows) or self.rows[position] != row:
            raise RepaError(
                f"{self.name} has no vector of row {shortened(row)}",
                f"give a row from {self.rows[0]} to {self.rows[-1]} whose image could be decoded",
                field="--like",
            )
        return position


class CacheBank(StoredBank):
    """The class tokens of a cache, read as they are asked for.

    Args:
        reader: of the column at least.
        column: ``<teacher>/cls``.
        view: name of the view.
    """

    def __init__(self, reader: CacheReader, column: str, view: str = "") -> None:
        manifest = reader.manifest
        view = view or manifest.views[0]
        if view not in manifest.views:
            raise RepaError(
                f"cache {reader.path} has no view {shortened(view)}",
                f"choose {' or '.join(manifest.views)}",
                field="--view",
            )
        source = source_of(column)
        said = BankSaid(
            version=VERSION,
            column=column,
            count=len(reader.valid_rows),
            cache=manifest.identity,
            source=manifest.source_identities[source],
            view=view,
            resolution=manifest.resolution,
            crop=manifest.crop,
            exif_orientation=manifest.exif_orientation,
            teacher=manifest.sources[source],
        )
        super().__init__(said, reader.valid_rows, f"cache {reader.path}")
        self._reader = reader
        self._view = manifest.views.index(view)

    @property
    def in_float16(self) -> bool:
        """Whether float16 holds its numbers as the cache does."""
        return self._reader.manifest.columns[self.said.column].dtype == "float16"

    @property
    def width(self) -> int:
        """Channels D of a vector."""
        return self._reader.manifest.columns[self.said.column].shape[0]

    def _vectors(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        # each row once, in the order of the files
        wanted, places = np.unique(self.rows[rows], return_inverse=True)
        spec = self._reader.manifest.columns[self.said.column]
        out = np.empty((len(wanted), *spec.shape), spec.numpy_dtype)
        views = np.full(len(wanted), self._view, np.int64)
        self._reader.read_rows(wanted, (self.said.column,), {self.said.column: out}, views=views)
        return out[places]


def open_cache_bank(path: CachePath, column: str, view: str = "") -> CacheBank:
    """Open the class tokens of a cache.

    Args:
        path: the cache.
        column: ``<teacher>/cls``; empty takes the cache's only one.
        view: name of the view; empty takes the first.

    Raises:
        CacheError: there is no cache, or no such column.
        RepaError: several could be meant, or there is no such view.
    """
    reader = CacheReader(path, ())
    columns = [name for name in reader.manifest.columns if "/" in name and split_column(name)[1] == CLS]
    if not column and len(columns) != 1:
        raise RepaError(
            f"cache {path} has {len(columns)} columns of class tokens ({', '.join(columns) or 'none'})",
            "choose the teacher with --encoder" if columns else "add one with `repa preprocess --encoder`",
            field="--encoder",
        )
    column = column or columns[0]
    return CacheBank(CacheReader(path, (column,)), column, view)


class WholeBank(StoredBank):
    """Vectors as they are.

    Args:
        said: what it is of.
        rows: the cache's row of each.
        name: for messages.
        values: floats ``[N, D]``.
    """

    def __init__(self, said: BankSaid, rows: NDArray[np.int64], name: str, values: NDArray[Any]) -> None:
        super().__init__(said, rows, name)
        self.values = values

    @property
    def width(self) -> int:
        """Channels D of a vector."""
        return int(self.values.shape[1])

    def _vectors(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        return self.values[rows]


class FactoredBank(StoredBank):
    """Vectors as coefficients in a basis, decoded as they are asked for.

    Args:
        said: what it is of.
        rows: the cache's row of each.
        name: for messages.
        basis: of all rows.
        coefficients: floats ``[N, d]``.
    """

    def __init__(
        self,
        said: BankSaid,
        rows: NDArray[np.int64],
        name: str,
        basis: Basis,
        coefficients: NDArray[Any],
    ) -> None:
        super().__init__(said, rows, name)
        self.basis = basis
        self.coefficients = coefficients

    @property
    def width(self) -> int:
        """Channels D of a vector."""
        return len(self.basis.mean)

    def _vectors(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        return self.basis.decoded(self.coefficients[rows].astype(np.float64))
