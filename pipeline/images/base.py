"""The contract of an image source, images in a fixed order with labels, where row i is image i."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 — dataclasses read it
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

AUTO_LABELS, FOLDER_LABELS, JSON_LABELS, NO_LABELS = "auto", "folders", "dataset.json", "none"
LABELS = (AUTO_LABELS, FOLDER_LABELS, JSON_LABELS, NO_LABELS)
"""What ``--labels`` takes."""
ONLY_CLASS = "images"
"""The class of every image of a set whose labels are left out."""


class UndecodableImage(Exception):  # noqa: N818 — the row stays, nothing failed
    """An image whose content is broken. Its row stays, marked invalid.

    Attributes:
        reason: one short line, the same on every machine: it becomes part of the commit record.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What flags say of the images, whatever kind they are of.

    Attributes:
        limit: number of images to take at most, evenly spaced; None takes all.
        apply_exif: turn images by their EXIF orientation.
        class_names: file with the name of a class in each line, where classes are numbers.
        labels: where labels come from, one of `LABELS`; ``auto``: what the images have.
    """

    limit: int | None = None
    apply_exif: bool = False
    class_names: Path | None = None
    labels: str = AUTO_LABELS


class ImageSource(Protocol):
    """Images in a fixed order, with labels. Must pickle: decoding happens in other processes.

    Attributes:
        name: for people: a folder's path, a pattern of tars, ``hf:…`` or ``demo``.
        kind: ``folder``, ``zip``, ``tars``, ``hf``, ``demo``, or what one from outside calls itself.
        keys: image key of every row, unique, ascending for a folder.
        labels: int32 ``[N]``, position of the class in ``class_names``.
        class_names: label → name.
        fingerprint: ``sha256:…``; equal for equal keys, labels and, as far as can be told cheaply, contents,
            wherever they lie.
        skipped: (path, why) of every file that was passed over.
        remarks: what a user should look at before an hour is spent, a sentence each.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def keys(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def labels(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def class_names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def skipped(self) -> Sequence[tuple[str, str]]: ...  # noqa: D102
    @property
    def remarks(self) -> Sequence[str]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def load(self, index: int, /) -> Image.Image:
        """Return the image of row ``index`` as RGB.

        Raises:
            UndecodableImage: the content is broken.
            RepaError: the file cannot be read.
        """
        ...
