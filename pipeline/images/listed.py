"""Image sources by listing, where a subclass lists its images once and reads the bytes of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import RepaError
from ...data.units import counted
from .base import NO_LABELS, ONLY_CLASS, SourceOptions
from .decode import decode_image
from .listing import check_key, class_names_of, fingerprint_of, spaced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All images of a set, in its order.

    Attributes:
        keys: a name of each, unique, without line breaks.
        sizes: bytes of each, as it is encoded; they tell changed images from the old ones.
        labels: class of each, counted from 0; None where the set has none.
        class_names: label → name; None calls classes by their numbers.
        skipped: (name, why) of what was passed over.
        remarks: what a user should look at, a sentence each.
    """

    keys: Sequence[str]
    sizes: Sequence[int] | NDArray[np.int64]
    labels: Sequence[int] | NDArray[np.integer] | None = None
    class_names: Sequence[str] | None = None
    skipped: Sequence[tuple[str, str]] = ()
    remarks: Sequence[str] = ()


class ListedImages(ABC):
    """An `ImageSource` of images that are listed once and read one by one.

    A subclass sets ``kind``, and says how images are listed and read. It must pickle, and its ``read`` may be
    called by several threads and processes.

    - ``limit`` takes images floor(i·N/limit) of the N; class names are those of all.
    - The fingerprint covers key, label and size in bytes of each image taken, and not where they lie.

    Args:
        place: what ``--data`` says after the image source's name.
        options: of the command.

    Raises:
        RepaError: the listing has no images, names one twice, or labels not all of them.
    """

    kind: str

    def __init__(self, place: str, options: SourceOptions) -> None:
        self.place = place
        self.options = options
        listing = self.list_images()
        labels, self.class_names = self._labels(listing)
        self._check_keys(listing)
        self._rows = spaced(len(listing.keys), options.limit)
        rows = self._rows.tolist()
        self.keys: Sequence[str] = [listing.keys[row] for row in rows]
        self.labels: NDArray[np.int32] = labels[self._rows]
        self.skipped = tuple(listing.skipped)
        self.remarks = tuple(listing.remarks)
        self.fingerprint = fingerprint_of(self.keys, self.labels, [int(listing.sizes[row]) for row in rows])

    @abstractmethod
    def list_images(self) -> Listing:
        """List all images, ``limit`` or not.

        Raises:
            RepaError: they cannot be listed.
        """

    @abstractmethod
    def read(self, number: int) -> bytes:
        """Return the encoded bytes of the image ``number`` of the listing.

        Raises:
            UndecodableImage: what is there is damaged.
            RepaError: it cannot be read.
        """

    @property
    def name(self) -> str:
        """What people call the images."""
        return self.place

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, index: int, /) -> Image.Image:
        """Return the image of row ``index`` as RGB, see `ImageSource.load`."""
        return decode_image(self.read(int(self._rows[index])), apply_exif=self.options.apply_exif)

    def _labels(self, listing: Listing) -> tuple[NDArray[np.int32], tuple[str, ...]]:
        count = len(listing.keys)
        if not count:
            raise RepaError(
                f"{self.name} has no images", "look at its name, or give other --data", field="--data"
            )
        if self.options.labels == NO_LABELS:
            return np.zeros(count, dtype=np.int32), (ONLY_CLASS,)
        if listing.labels is None:
            raise RepaError(
                f"{self.name} has no labels",
                "give `--labels none` to encode its images as one class",
                field="--labels",
            )
        labels = np.asarray(listing.labels, dtype=np.int64)
        wrong = np.flatnonzero((labels < 0) | (labels >= 2**31))
        if len(labels) != count or len(wrong):
            what = f"{counted(len(labels), 'label')} for {counted(count, 'image')}"
            if len(wrong):
                what = f"the label {labels[wrong[0]]} for {listing.keys[int(wrong[0])]}"
            raise RepaError(
                f"{self.name} has {what}",
                "number the classes from 0, one label for each image",
                field="--data",
            )
        if listing.class_names is None:
            names = class_names_of(labels, self.options.class_names, where=self.name)
        elif int(labels.max()) < len(listing.class_names):
            names = tuple(listing.class_names)
        else:
            raise RepaError(
                f"{self.name} has the label {labels.max()}, and names {len(listing.class_names)} classes",
                "name each class",
                field="--data",
            )
        return labels.astype(np.int32), names

    def _check_keys(self, listing: Listing) -> None:
        seen: set[str] = set()
        for key in listing.keys:
            check_key(key, self.name)
            if key in seen:
                raise RepaError(
                    f"{self.name} has two images called {key!r}", "keys name rows: rename one", field="--data"
                )
            seen.add(key)
        if len(listing.sizes) != len(listing.keys):
            raise RepaError(
                f"{self.name} lists {len(listing.sizes)} sizes for {len(listing.keys)} images",
                "give one for each",
                field="--data",
            )
