"""What samples are compared with, as statistics, images, or the columns of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from ...data.errors import CacheError, RepaError
from ...data.format.columns import column_name, split_column
from ...data.format.opening import open_manifest
from ...data.reading.reader import CacheReader
from ..sampling.record import sha256_of
from .image_sets import IMAGES, array_of, names_in, open_array
from .moments import Moments
from .networks import INCEPTION
from .registry import REFERENCE_SPATIAL_STATISTICS, REFERENCE_STATISTICS
from .results import ReferenceSaid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ...data.storage.bucket import CachePath

FLAG: Final = "--reference"
CLASS_VECTOR: Final = "cls"
# input of a metric → mean and covariance in an .npz file of ADM's
_STATISTICS: Final = {
    REFERENCE_STATISTICS: ("mu", "sigma"),
    REFERENCE_SPATIAL_STATISTICS: ("mu_s", "sigma_s"),
}
_READ_ROWS: Final = 4096


class ReferenceImages(Protocol):
    """The images of a reference, of which only the number is asked here."""

    @property
    def count(self) -> int:
        """Number of images."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are compared with.

    Attributes:
        said: what evaluations record of it.
        resolution: side of its images in pixels; None where it has statistics alone.
        statistics: of Inception's features, input of a metric → moments.
        images: to compute features of; None where there are none.
        cache: whose columns are features; None if it is none.
        encoders: encoders whose class vectors the cache holds.
    """

    said: ReferenceSaid
    resolution: int | None = None
    statistics: Mapping[str, Moments] = field(default_factory=dict)
    images: ReferenceImages | None = None
    cache: CachePath | None = None
    encoders: tuple[str, ...] = ()

    def count(self, network: str) -> int:
        """Return how many images have features of a network, or can be given them."""
        if self.cache is None:
            return 0 if self.images is None else self.images.count
        if network not in self.encoders:
            return 0
        with CacheReader(self.cache, (column_name(network, CLASS_VECTOR),)) as reader:
            return len(reader.valid_rows)

    def statistics_of(self, network: str) -> Mapping[str, Moments]:
        """Return the moments of a network's features that are there ready, by the input that they are."""
        return self.statistics if network == INCEPTION else {}

    def cached_features(self, encoder: str) -> NDArray[np.float32]:
        """Return the class vectors of every valid image of the cache in its first view, float32 ``[M, D]``.

        Raises:
            CacheError: the column is not complete.
            RepaError: the reference is no cache.
        """
        if self.cache is None:
            raise RepaError(f"{self.said.name} is no cache", "give one", field=FLAG)
        column = column_name(encoder, CLASS_VECTOR)
        with CacheReader(self.cache, (column,)) as reader:
            spec = reader.manifest.columns[column]
            rows = reader.valid_rows
            found = np.empty((len(rows), *spec.shape), np.float32)
            for first in range(0, len(rows), _READ_ROWS):
                chunk = rows[first : first + _READ_ROWS]
                values = np.empty((len(chunk), *spec.shape), spec.numpy_dtype)
                reader.read_rows(chunk, (column,), {column: values})
                found[first : first + len(chunk)] = values
        return found


def reference_of_cache(cache: CachePath) -> Reference:
    """Return a cache as a reference.

    Raises:
        CacheError: there is none.
    """
    manifest = open_manifest(cache)
    parts = [split_column(name) for name in manifest.columns]
    return Reference(
        said=ReferenceSaid(name=str(cache), sha256=manifest.identity, kind="cache"),
        resolution=manifest.resolution,
        cache=cache,
        encoders=tuple(source for source, kind in parts if kind == CLASS_VECTOR),
    )


def reference_of_file(file: Path) -> Reference:
    """Return an .npz file as a reference, with images, statistics or both, as ADM's are laid out.

    Raises:
        RepaError: it has neither, or what it has is damaged.
    """
    names = names_in(file, field=FLAG)
    statistics = {
        need: _moments(file, mean, covariance)
        for need, (mean, covariance) in _STATISTICS.items()
        if mean in names and covariance in names
    }
    images = open_array(file, field=FLAG) if IMAGES in names else None
    if images is None and not statistics:
        raise RepaError(
            f"{file} holds neither images ({IMAGES}) nor statistics (mu, sigma)",
            "give a reference file of the ADM evaluation suite, a cache or a folder of images",
            field=FLAG,
        )
    return Reference(
        said=ReferenceSaid(
            name=str(file), sha256=sha256_of(file) if images is None else images.sha256, kind="npz"
        ),
        resolution=None if images is None else images.resolution,
        statistics=statistics,
        images=images,
    )


def is_cache(path: Path) -> bool:
    """Return whether a folder is a cache."""
    try:
        open_manifest(path)
    except (CacheError, RepaError):
        return (path / "zarr.json").exists()
    return True


def _moments(file: Path, mean: str, covariance: str) -> Moments:
    try:
        return Moments(_numbers(file, mean), _numbers(file, covariance))
    except RepaError as error:
        if error.field == FLAG:
            raise
        raise RepaError(f"{mean}, {covariance} of {file}: {error.what}", error.remedy, field=FLAG) from error


def _numbers(file: Path, name: str) -> NDArray[np.float64]:
    values = array_of(file, name)
    if values.dtype.kind not in "fiu":
        raise RepaError(f"{name} of {file} holds no numbers", "write the file again", field=FLAG)
    return np.asarray(values, np.float64)
