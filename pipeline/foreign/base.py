"""What a layout of another program gives: rows in an order, and what is known of them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...data.errors import RepaError
from ...data.format.manifest import ORIGINAL_VIEW
from .arrays import MOST_BYTES, checked_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ...data.reading.latents import LatentScale
    from .places import Place


@dataclass(frozen=True, kw_only=True)
class ForeignOptions:
    """What flags say of the latents, beside where they lie.

    Attributes:
        data: images whose paths name the rows, of a layout that names none; see `open_source`.
        scaling_factor: what the shifted latent is multiplied by; None: what the layout's program does.
        shift_factor: what is subtracted first; None likewise.
    """

    data: str | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None


class ForeignLatents(ABC):
    """Latents that another program wrote.

    Attributes:
        layout: its name, as of ``--format``.
        latents: ``posterior`` or ``sampled``, see `ForeignNote`.
        mirrored: see `ForeignNote`.
        place: where they lie.
        files: names of all files that are read, sorted.
        keys: of every row.
        labels: int32 ``[N]``.
        class_names: label → name.
        views: names of the views.
        shape: of the moments of a row and view ``[2C, h, w]``.
        scale: what a backbone trains on.
        factor: pixels to a side of a latent's position, of the layout's autoencoder.
        remarks: what a user should look at, a sentence each.
    """

    layout: ClassVar[str]
    latents: ClassVar[str]
    mirrored: ClassVar[str] = "no"

    place: Place
    files: Sequence[str]
    keys: Sequence[str]
    labels: NDArray[np.int32]
    class_names: Sequence[str]
    views: tuple[str, ...] = (ORIGINAL_VIEW,)
    shape: tuple[int, int, int]
    scale: LatentScale
    factor: int
    remarks: tuple[str, ...] = ()

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each row's file, 0 where it has none of its own."""
        return [0] * len(self.keys)

    @abstractmethod
    def survey(self, name: str) -> str:
        """Return the sha256 of a file, all of whose numbers are checked.

        Raises:
            RepaError: it cannot be read, or is not what the layout says.
        """

    @abstractmethod
    def read(self, row: int) -> NDArray[np.float32]:
        """Return the moments of a row ``[V, 2C, h, w]``, unscaled, mean before standard deviation.

        Raises:
            RepaError: see `survey`.
        """


class FilePerRow(ForeignLatents):
    """Latents of which each row has a file of its own.

    Attributes:
        rows: name of each row's file.
    """

    rows: Sequence[str]

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each row's file."""
        return [self.place.sizes[name] for name in self.rows]

    @abstractmethod
    def decode(self, raw: bytes, where: str) -> NDArray[np.float32]:
        """Return the moments in the bytes of a row's file, see `read`."""

    def survey(self, name: str) -> str:
        """Return the sha256 of a file, see `ForeignLatents.survey`."""
        raw = self.place.read(name, MOST_BYTES)
        if name in self._row_names:
            self.decode(raw, self.where(name))
        return hashlib.sha256(raw).hexdigest()

    def read(self, row: int) -> NDArray[np.float32]:
        """Return the moments of a row, see `ForeignLatents.read`."""
        name = self.rows[row]
        return self.decode(self.place.read(name, MOST_BYTES), self.where(name))

    def where(self, name: str) -> str:
        """Name a file for an error."""
        return f"{self.place.name}/{name}"

    def settle_rows(self, rows: Sequence[str]) -> None:
        """Set `rows`, and have them looked up by name."""
        self.rows = rows
        self._row_names = frozenset(rows)


def moments_of_draw(latent: NDArray[Any]) -> NDArray[np.float32]:
    """Return the moments ``[2C, h, w]`` whose every draw is a latent ``[C, h, w]``, with deviation 0."""
    return np.concatenate([latent, np.zeros_like(latent)]).astype(np.float32, copy=False)


def image_shape(array: NDArray[Any], where: str, *, even: bool) -> tuple[int, int, int]:
    """Return the shape ``[C, h, w]`` of the first image's numbers, to which all others are held.

    Args:
        array: as it was read.
        where: the file's name, for the error.
        even: whether the channels are two halves.

    Raises:
        RepaError: it has other axes, is not square, or is of an odd number of channels.
    """
    if array.ndim != 3 or not 0 < array.size <= MOST_BYTES or array.shape[1] != array.shape[2]:
        raise RepaError(
            f"{where} has the shape {list(array.shape)}, and latents are [channels, side, side]",
            "name the folder of such files",
        )
    channels, rows, columns = array.shape
    if even and channels % 2:
        raise RepaError(
            f"{where} has {channels} channels, and mean and deviation have as many each",
            "name the folder of such files",
        )
    checked_numbers(array, array.shape, where)
    return channels, rows, columns


def chosen_scale(default: LatentScale, options: ForeignOptions) -> LatentScale:
    """Return what the layout's program does to latents, or what flags say instead.

    Raises:
        RepaError: a factor of 0, or a shift of latents that have a mean for each channel.
    """
    from ...data.reading.latents import scale_of

    chosen: Mapping[str, Any] = {
        **default.notes(),
        **({} if options.scaling_factor is None else {"scaling_factor": options.scaling_factor}),
        **({} if options.shift_factor is None else {"shift_factor": options.shift_factor}),
    }
    return scale_of(
        chosen,
        where="what is said of the latents",
        remedy="give --scaling-factor as the other program multiplies by, and --shift-factor only without "
        "statistics of channels",
        error=RepaError,
    )
